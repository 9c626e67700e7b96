"""Small images in memory: the split, augmentation and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from vision.small import SmallImages, erase, hold_out, recolour, shift_and_flip, turn_and_zoom


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


def test_shifts_mirror_at_the_border_and_flips_turn():
    torch.manual_seed(0)
    image = torch.arange(25).view(1, 1, 5, 5).expand(400, 1, 5, 5)
    moved = shift_and_flip(image, 2, 0.5)
    assert moved.shape == image.shape
    padded = torch.nn.functional.pad(image[:1].float(), (2, 2, 2, 2), mode="reflect").long()[0, 0]
    possible = {tuple(padded[i : i + 5, j : j + 5].flatten().tolist()) for i in range(5) for j in range(5)}
    possible |= {tuple(torch.tensor(p).view(5, 5).flip(1).flatten().tolist()) for p in possible}
    assert {tuple(m.flatten().tolist()) for m in moved} == possible


@pytest.mark.parametrize("size", [(9, 9), (8, 14)])
def test_turning_and_zooming(size, monkeypatch):
    ends = torch.ones(2, 3)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda t, *_: t.copy_(ends.view(t.shape)))
    rows, columns = (torch.arange(n) - (n - 1) / 2 for n in size)
    image = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))  # each pixel holds its place
    inside = (slice(None), slice(size[0] // 2 - 2, size[0] // 2 + 2), slice(size[1] // 2 - 2, size[1] // 2 + 2))
    turned = turn_and_zoom(image.expand(3, -1, -1, -1), 30, 0.25)[1]
    cos, sin = 0.75**0.5 / 1.25, 0.5 / 1.25
    wanted = torch.stack((cos * image[0] + sin * image[1], cos * image[1] - sin * image[0]))
    torch.testing.assert_close(turned[inside], wanted[inside])
    torch.testing.assert_close(turn_and_zoom(image[None].expand(3, -1, -1, -1), 0, 0)[0], image)


def test_colours_change_by_what_is_allowed():
    torch.manual_seed(0)
    image = torch.full((400, 3, 2, 2), 0.5)
    image[:, 0] = 0.6
    changed = recolour(image, 0.2)
    assert torch.equal(changed[:, 1], changed[:, 2])
    assert 0.3 < changed.min() < 0.45
    assert 0.6 < changed.max() < 0.8
    spread = (changed[:, 0] - changed[:, 1]) / changed.mean((1, 2, 3))[:, None, None]
    assert spread.min() > 0.1 / 0.54 * 0.8**2
    assert spread.max() < 0.1 / 0.52 * 1.2**2 * 1.05
    torch.testing.assert_close(recolour(image, 0), image)


def test_erasing_cuts_a_square():
    torch.manual_seed(0)
    erased = (erase(torch.ones(300, 2, 9, 9), 4) == 0).float()
    assert torch.equal(erased[:, 0], erased[:, 1])
    counts = erased[:, 0].sum((1, 2))
    assert counts.max() == 16
    assert counts.min() >= 4
    assert (erased[:, 0].mean(0) > 0).all()


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
