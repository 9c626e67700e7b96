"""Augmentation of batches, operation by operation against Pillow."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vision.augment import OPERATIONS, distort, equalize, erase, random_distortions, shift_and_flip

Picture = Image.Image
FULL: dict[str, Callable[[Picture], Picture]] = {  # what each operation does at full strength, by Pillow
    "brightness": lambda x: ImageEnhance.Brightness(x).enhance(1.9),
    "colour": lambda x: ImageEnhance.Color(x).enhance(1.9),
    "contrast": lambda x: ImageEnhance.Contrast(x).enhance(1.9),
    "sharpness": lambda x: ImageEnhance.Sharpness(x).enhance(1.9),
    "solarize": lambda x: ImageOps.solarize(x, 0),
    "posterize": lambda x: ImageOps.posterize(x, 4),
    "autocontrast": ImageOps.autocontrast,
    "rotate": lambda x: x.rotate(30, Image.Resampling.BILINEAR),
    "shear_x": lambda x: x.transform(x.size, Image.Transform.AFFINE, (1, 0.3, -0.15 * 32, 0, 1, 0), 2),
    "shear_y": lambda x: x.transform(x.size, Image.Transform.AFFINE, (1, 0, 0, 0.3, 1, -0.15 * 32), 2),
    "translate_x": lambda x: x.transform(x.size, Image.Transform.AFFINE, (1, 0, 10, 0, 1, 0), 2),
    "translate_y": lambda x: x.transform(x.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, 10), 2),
}


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    smooth = torch.nn.functional.interpolate(torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(0)), 32)
    return (smooth * 200 + 20).round() / 255


def strengths(count: int, value: float) -> Tensor:
    return torch.full((count,), value)


@pytest.mark.parametrize("name", FULL)
def test_does_what_pillow_does(pictures, name):
    pixels = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    wanted = np.stack([np.asarray(FULL[name](Image.fromarray(p))) for p in pixels])
    chosen = torch.full((6,), OPERATIONS.index(name))
    found = distort(pictures, chosen, strengths(6, 1.0)).permute(0, 2, 3, 1) * 255
    off = (found - torch.from_numpy(wanted)).abs()[:, 11:21, 11:21]  # what came in from outside is mirrored here
    assert off.max() <= 1.5, off.max()
    assert np.abs(wanted.astype(float) - pixels).max() > 8


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"autocontrast", "equalize"}))
def test_nothing_happens_without_strength(pictures, name):
    chosen = torch.full((6,), OPERATIONS.index(name))
    torch.testing.assert_close(distort(pictures, chosen, strengths(6, 0.0)), pictures, rtol=0, atol=1e-4)


def test_each_image_has_an_operation_of_its_own(pictures):
    chosen = torch.tensor(
        [OPERATIONS.index(n) for n in ("identity", "rotate", "solarize", "equalize", "colour", "posterize")]
    )
    together = distort(pictures, chosen, strengths(6, 0.7))
    for i in range(6):
        alone = distort(pictures[i : i + 1], chosen[i : i + 1], strengths(1, 0.7))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together[0], pictures[0], rtol=0, atol=1e-4)


def test_wide_pictures_turn_without_being_stretched():
    rows, columns = (torch.arange(n) - (n - 1) / 2 for n in (16, 24))
    places = torch.stack([*torch.meshgrid(rows, columns, indexing="ij"), torch.zeros(16, 24)]) / 64 + 0.5
    turned = (distort(places[None], torch.tensor([1]), torch.ones(1))[0] - 0.5) * 64
    wanted = 0.75**0.5 * columns + 0.5 * -rows[:, None]
    torch.testing.assert_close(turned[1, 5:11, 9:15], wanted[5:11, 9:15], rtol=0, atol=1e-3)


def test_equalizing_spreads_the_levels():
    levels = torch.tensor([10.0, 10, 11, 250]).view(1, 1, 2, 2) / 255
    torch.testing.assert_close(equalize(levels).flatten(), torch.tensor([0.0, 0, 0.5, 1]))
    assert torch.equal(equalize(torch.full((1, 3, 2, 2), 0.2)), torch.full((1, 3, 2, 2), 0.2))


def test_random_distortions_stay_within_bounds(pictures):
    torch.manual_seed(0)
    many = pictures[:1].expand(300, -1, -1, -1)
    found = random_distortions(many, 2)
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - many).abs().amax((1, 2, 3)).gt(0.02).float().mean() > 0.8
    assert torch.equal(random_distortions(many, 0), many)


def test_shifts_mirror_at_the_border_and_flips_turn():
    torch.manual_seed(0)
    image = torch.arange(25).view(1, 1, 5, 5).expand(400, 1, 5, 5)
    moved = shift_and_flip(image, 2, 0.5)
    assert moved.shape == image.shape
    padded = torch.nn.functional.pad(image[:1].float(), (2, 2, 2, 2), mode="reflect").long()[0, 0]
    possible = {tuple(padded[i : i + 5, j : j + 5].flatten().tolist()) for i in range(5) for j in range(5)}
    possible |= {tuple(torch.tensor(p).view(5, 5).flip(1).flatten().tolist()) for p in possible}
    assert {tuple(m.flatten().tolist()) for m in moved} == possible


def test_erasing_cuts_a_square():
    torch.manual_seed(0)
    erased = (erase(torch.ones(300, 2, 9, 9), 4) == 0).float()
    assert torch.equal(erased[:, 0], erased[:, 1])
    counts = erased[:, 0].sum((1, 2))
    assert counts.max() == 16
    assert counts.min() >= 4
    assert (erased[:, 0].mean(0) > 0).all()
