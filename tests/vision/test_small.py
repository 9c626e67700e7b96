"""Small images in memory: the split, augmentation and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from vision.small import SmallImages, hold_out


def write(root, parts=("train",), count=8, size=(8, 8)):
    for part in parts:
        for number, name in enumerate(("a", "b")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((*size, 3), 10 * i + 100 * number, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")


def test_holds_out_the_same_images_of_each_class(tmp_path):
    write(tmp_path)
    data = SmallImages(str(tmp_path), held_out=4, batch_size=4)
    data.setup("fit")
    assert [len(data.parts[name][1]) for name in ("train", "val")] == [12, 4]
    assert data.parts["val"][1].tolist() == [0, 0, 1, 1]
    again = SmallImages(str(tmp_path), held_out=4, batch_size=4)
    again.setup("fit")
    assert torch.equal(again.parts["val"][0], data.parts["val"][0])
    both = torch.cat([data.parts[name][0][:, 0, 0, 0] for name in ("train", "val")])
    assert sorted(both.tolist()) == sorted(10 * i + 100 * n for i in range(8) for n in range(2))


def test_batches_are_normalised_and_enlarged(tmp_path):
    write(tmp_path, ("train", "val"))
    data = SmallImages(str(tmp_path), batch_size=4, img_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    data.setup("test")
    images, labels = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    assert images.shape == (4, 3, 16, 16)
    torch.testing.assert_close(images[3], torch.full((3, 16, 16), (30 / 255 - 0.5) / 0.25))
    assert labels.tolist() == [0, 0, 0, 0]
    assert data.preprocessing()["img_size"] == 16


@pytest.mark.parametrize("count", [1, 40])
def test_too_few_or_too_many_held_out(count):
    with pytest.raises(UserError, match=f"--data.held_out {count}: that is"):
        hold_out(torch.zeros(10, 3, 2, 2), torch.tensor([0, 1] * 5), count)


def test_other_sizes_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no folder of images"):
        SmallImages().setup("fit")
    with pytest.raises(UserError, match="no folder train/"):
        SmallImages(str(tmp_path)).setup("fit")
    write(tmp_path)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "train" / "b" / "9.png")
    with pytest.raises(UserError, match=r"9\.png: got 8 x 9 pixels, wanted 8 x 8"):
        SmallImages(str(tmp_path), held_out=4, batch_size=4).setup("fit")
