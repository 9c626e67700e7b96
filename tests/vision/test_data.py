"""Data modules: the digits' split, folders of images, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from vision.data import Augmentation, ImageFolder
from vision.digits import Digits, move
from vision.files import RepeatedAugmentation


@pytest.fixture
def tree(tmp_path):
    """A small data set; the classes differ in brightness."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for level, name in ((60, "dark"), (180, "light")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 40, level + 40, (20, 24 + i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def folder(root, **options) -> ImageFolder:
    data = ImageFolder(str(root), **{"img_size": 16, "batch_size": 4, "num_workers": 0, **options})
    data.setup("fit")
    return data


def batches(data, loader) -> list:
    return [data.on_before_batch_transfer(batch, 0) for batch in loader]


# Digits.


def test_digits_are_split_once_and_for_all():
    data = Digits()
    data.setup("fit")
    assert {name: len(labels) for name, (_, labels) in data.parts.items()} == {"train": 1257, "val": 180, "test": 360}
    for images, labels in data.parts.values():
        assert np.bincount(labels).min() >= 0.9 * len(labels) / 10
        assert images.shape[1:] == (1, 8, 8)
    again = Digits()
    again.setup("test")
    assert torch.equal(again.parts["test"][0], data.parts["test"][0])
    everything = torch.cat([images.flatten(1) for images, _ in data.parts.values()])
    assert len(everything) == 1797
    train, test = data.parts["train"][0].flatten(1), data.parts["test"][0].flatten(1)
    assert not (torch.cdist(test, train) == 0).any()  # no image stands in both


def test_digits_batches_are_normalised():
    data = Digits(batch_size=1257, max_shift=0, max_rotation=0)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01
    assert data.to_pixels(images[0]).max() == 255


def test_baseline_is_better_than_chance_and_worse_than_perfect():
    data = Digits()
    data.setup("test")
    assert 0.9 < data.baselines()["logistic_regression"] < 0.99


def test_moving_by_nothing_changes_nothing():
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(move(images, 0.0, 0.0), images)


def test_moving_stays_within_its_bounds():
    torch.manual_seed(0)
    images = torch.zeros(200, 1, 9, 9)
    images[:, :, 4, 4] = 1
    shifted = move(images, 2.0, 0.0).squeeze(1)
    rows = torch.arange(9.0)
    centre = (shifted.sum(2) * rows).sum(1) / shifted.sum((1, 2))
    assert (centre - 4).abs().max() <= 2.01
    assert (centre - 4).std() > 0.8


# Folders.


def test_folder_gives_its_classes_and_images(tree):
    data = folder(tree)
    assert data.class_names == ["dark", "light"]
    assert data.num_classes == 2
    images, labels = zip(*batches(data, data.val_dataloader()), strict=True)
    images, labels = torch.cat(images), torch.cat(labels)
    assert images.shape == (6, 3, 16, 16)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (images.mean((1, 2, 3)) > 0).long().tolist() == labels.tolist()
    assert data.to_pixels(images[0]).shape == (16, 16, 3)


def test_training_images_are_augmented_and_whole_batches(tree):
    data = folder(tree, augmentation=Augmentation(repeats=1), batch_size=5)
    first, second = (batches(data, data.train_dataloader()) for _ in range(2))
    assert [len(labels) for _, labels in first] == [5, 5]
    assert not torch.equal(first[0][0], second[0][0])


def test_test_part_is_val_without_one(tree):
    data = folder(tree)
    assert len(data.test_dataloader().dataset) == 6
    (tree / "val").rename(tree / "test")
    (tree / "train").rename(tree / "val")
    for name in ("dark", "light"):
        (tree / "train" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (9, 9)).save(tree / "train" / name / f"{i}.JPG", "JPEG")
    assert len(folder(tree).test_dataloader().dataset) == 6
    assert len(folder(tree).val_dataloader().dataset) == 12


def test_repeated_augmentation_repeats_in_a_row():
    order = list(RepeatedAugmentation(10, 3))
    assert len(order) == 10
    assert [order[i] for i in (0, 3, 6)] == [order[i + 2] for i in (0, 3, 6)]
    assert len(set(order)) == 4
    torch.manual_seed(1)
    assert order != list(RepeatedAugmentation(10, 3)) or order != list(RepeatedAugmentation(10, 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_reads(tree, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new(mode, (20, 20)).save(tree / "val" / "dark" / f"0.{suffix}")
    data = folder(tree)
    assert all(images.shape[1] == 3 for images, _ in batches(data, data.val_dataloader()))


def spoil(tree, how):
    path = tree / "train" / "dark" / "2.png"
    path.write_bytes(b"not an image, though it says so" if how == "text" else path.read_bytes()[:400])
    return path


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "reason"), [("text", "not an image, though its name ends in .png"), ("cut", "damaged")]
)
def test_unreadable_image_is_an_error_that_names_the_file(tree, how, reason, workers):
    path = spoil(tree, how)

    def run():
        data = folder(tree, num_workers=workers, augmentation=Augmentation(repeats=1))
        batches(data, data.train_dataloader())

    with pytest.raises(UserError, match=reason) as error:
        run()
    assert str(path) in str(error.value)
    assert "--data.skip_unreadable true" in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("how", ["text", "cut"])
def test_unreadable_image_is_left_out_on_request_and_noted(tree, how):
    path = spoil(tree, how)
    data = folder(tree, skip_unreadable=True, augmentation=Augmentation(repeats=1), batch_size=4)
    seen = sum(len(labels) for _ in range(6) for _, labels in batches(data, data.train_dataloader()))
    assert list(data.left_out) == [str(path)]
    assert seen < 6 * 12


def test_missing_folder_is_refused(tmp_path):
    for root in (None, str(tmp_path / "none")):
        with pytest.raises(UserError, match=r"ROOT/train/CLASS.*ROOT/val/CLASS"):
            _ = ImageFolder(root).num_classes


def test_missing_val_is_refused(tree):
    (tree / "val").rename(tree / "valid")
    with pytest.raises(UserError, match=r"no folder val/ in it, got train, valid"):
        folder(tree)


def test_flat_folder_is_refused(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        Image.new("L", (9, 9)).save(tmp_path / part / "a.png")
    with pytest.raises(UserError, match="no class folders"):
        folder(tmp_path)


def test_other_classes_in_val_are_refused(tree):
    (tree / "val" / "dark").rename(tree / "val" / "night")
    with pytest.raises(UserError, match="dark only in train/, night only in val/"):
        folder(tree)


def test_empty_class_is_refused(tree):
    for path in (tree / "train" / "light").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"light: no image in it"):
        folder(tree)


def test_less_than_a_batch_is_refused(tree):
    with pytest.raises(UserError, match="got 12 images, wanted at least one batch of 64"):
        folder(tree, batch_size=64)
