"""Data sets that timm reads: batches, the loader's order, and what is refused."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from core.errors import UserError
from vision.data import Augmentation
from vision.timm_data import TimmImages

PLAIN = Augmentation(policy=None, color_jitter=0.0, random_erasing=0.0, repeats=1)


def folder(root, count=6):
    for part in ("train", "validation"):
        for number, name in enumerate(("a", "b")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20, 20, 3), 100 * number + i, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize("repeats", [1, 3])
def test_folder(tmp_path, repeats):
    augmentation = Augmentation(policy=None, color_jitter=0.0, random_erasing=0.0, repeats=repeats)
    data = TimmImages(
        "", str(folder(tmp_path)), num_classes=2, img_size=16, batch_size=4, num_workers=0, augmentation=augmentation
    )
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    assert batches[0][0].shape == (4, 3, 16, 16)
    assert len({float(x.mean()) for images, _ in batches for x in images}) <= (12 if repeats == 1 else 4)
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    assert labels.tolist() == [0] * 6 + [1] * 6


def test_webdataset_shards(tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    folder(tmp_path / "files")
    splits = {}
    for part in ("train", "validation"):
        with tarfile.open(tmp_path / f"x-{part}-0000.tar", "w") as archive:
            for number, name in enumerate(("a", "b")):
                for i in range(6):
                    stem = f"{name}{i}"
                    archive.add(tmp_path / "files" / part / name / f"{i}.png", f"{stem}.png")
                    (tmp_path / "label.cls").write_text(str(number))
                    archive.add(tmp_path / "label.cls", f"{stem}.cls")
        splits[part] = {"name": part, "filenames": [f"x-{part}-0000.tar"], "shard_lengths": [12], "num_samples": 12}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    data = TimmImages("wds/x", str(tmp_path), 2, img_size=16, batch_size=4, num_workers=0, augmentation=PLAIN)
    data.setup("fit")
    assert isinstance(data.sets["train"], IterableDataset)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert set(labels.tolist()) <= {0, 1}
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 12


@pytest.mark.parametrize("name", ["", "nothing/x"])
def test_what_timm_cannot_read_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="timm cannot read the part 'train'"):
        TimmImages(name, str(tmp_path / "none"), 2).setup("fit")
