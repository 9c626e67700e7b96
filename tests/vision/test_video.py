"""Video clips in folders: layouts, frames, a short training, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from core.cli import main
from core.errors import UserError
from vision.module import Classifier, MixupOptions
from vision.video import ClipFiles, VideoFolder, read_frames, sample_frames


def write(root, parts=("train", "val"), count=4, frames=6):
    """Clips that brighten (class up) or darken (class down), half of them arrays and half folders of frames."""
    for part in parts:
        for label, name in enumerate(("down", "up")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                levels = np.linspace(20 + i, 220 + i, frames)[:: 1 if label else -1].astype(np.uint8)
                clip = np.broadcast_to(levels[:, None, None, None], (frames, 24, 32, 3))
                if i % 2:
                    np.savez_compressed(root / part / name / f"{i}.npz", frames=clip)
                    continue
                (root / part / name / f"{i}").mkdir()
                for t, frame in enumerate(clip):
                    Image.fromarray(np.ascontiguousarray(frame)).save(root / part / name / f"{i}" / f"{t:04d}.png")


@pytest.mark.parametrize(
    ("count", "wanted", "stride", "frames"),
    [(8, 4, 1, [2, 3, 4, 5]), (8, 3, 3, [0, 3, 6]), (3, 4, 1, [0, 1, 2, 2]), (5, 3, 2, [0, 2, 4]), (1, 2, 4, [0, 0])],
)
def test_evaluation_takes_frames_from_the_middle(count, wanted, stride, frames):
    assert sample_frames(count, wanted, stride, random=False) == frames


def test_training_takes_frames_from_anywhere():
    starts = {sample_frames(8, 3, 2, random=True)[0] for _ in range(200)}
    assert starts == {0, 1, 2, 3}


def test_folders_and_arrays_give_the_same_clip(tmp_path):
    write(tmp_path)
    data = VideoFolder(str(tmp_path), img_size=16, num_frames=4, batch_size=2, num_workers=0, crop_pct=1.0)
    data.setup("fit")
    assert [path.name for path, _ in data.images["val"]] == ["0", "1.npz", "2", "3.npz"] * 2
    batch = next(iter(data.val_dataloader()))
    assert batch.images.shape == (2, 3, 4, 16, 16)
    levels = np.linspace(20, 220, 6)[::-1].astype(np.uint8)[1:5] / 255
    mean, std = (torch.tensor(value).view(3, 1) for value in (data.mean, data.std))
    wanted = (torch.tensor(levels) - mean) / std
    torch.testing.assert_close(batch.images[0, :, :, 8, 8], wanted.float(), rtol=1e-4, atol=1e-4)
    assert data.to_pixels(batch.images[0]).shape == (16, 16, 3)
    files = [path for path, _ in data.images["val"]]
    assert read_frames(files[0], lambda n: list(range(n))).shape == read_frames(files[1], lambda n: [0] * n).shape


def test_all_frames_are_cropped_and_mirrored_alike(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    still = np.random.default_rng(0).integers(0, 256, (1, 40, 48, 3), np.uint8).repeat(5, 0)
    np.save(tmp_path / "train" / "a" / "still.npy", still)
    (tmp_path / "val" / "a").mkdir(parents=True)
    np.save(tmp_path / "val" / "a" / "still.npy", still)
    data = VideoFolder(str(tmp_path), img_size=16, num_frames=5, batch_size=1, num_workers=0)
    data.setup("fit")
    one, other = (next(iter(data.train_dataloader())).images for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(one, one[:, :, :1].expand_as(one))


def test_mixing_treats_all_frames_alike():
    torch.manual_seed(0)
    model = Classifier("test_mamba_nd_3d", 2, mixup=MixupOptions(mixup=0.0, cutmix=1.0))
    seen = []
    model.net.forward = lambda x: seen.append(x) or torch.zeros(len(x), 2, requires_grad=True)
    video = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 3, 4, 16, 16)
    model.loss((video, torch.tensor([0, 1])))
    assert seen[0].shape == video.shape
    assert 0 < seen[0][0].mean() < 1
    assert torch.equal(seen[0], seen[0][:, :1, :1].expand_as(seen[0]))


def test_a_short_training_learns_what_one_frame_does_not_show(tmp_path):
    write(tmp_path, count=8)
    main(
        "vision", "vision.module.Classifier", "vision.data.ImageData", choose_data=True,
        links={"data.num_classes": "model.num_classes"}, argv=[
            "video", "--data.root", str(tmp_path), "--run_dir", str(tmp_path / "run"), "--data.img_size", "16",
            "--data.num_frames", "4", "--data.batch_size", "8", "--data.num_workers", "0", "--data.crop_pct", "1.0",
            "--data.augmentation.horizontal_flip", "0", "--model.name", "test_mamba_nd_3d",
            "--model.kwargs", "{img_size: 16, num_frames: 4, depth: 6, patch_size: 8}", "--model.mixup", "null",
            "--model.optimizer", "{name: adamw, lr: 5.0e-3}", "--model.schedule.warmup_epochs", "1",
            "--trainer.max_epochs", "12", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu",
            "--trainer.accumulate_grad_batches", "1", "--trainer.enable_progress_bar", "false",
        ],
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test/accuracy"] > 0.9
    assert (tmp_path / "run" / "report.html").exists()


def test_what_cannot_be_read_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "train" / "up" / "1.npz").write_bytes(b"nothing")
    data = VideoFolder(str(tmp_path), num_frames=2, batch_size=8, num_workers=0)
    data.setup("fit")
    with pytest.raises(UserError, match=r"1\.npz: not an array of frames"):
        data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    np.save(tmp_path / "grey.npy", np.zeros((4, 8, 8), np.uint8))
    fault = ClipFiles([(tmp_path / "grey.npy", 0)], 2, 1, False, lambda x: x)[0]
    assert fault.reason.startswith("got an array (4, 8, 8) of uint8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no frame in it"):
        read_frames(tmp_path / "empty", lambda n: [0])
    (tmp_path / "val" / "other").mkdir()
    with pytest.raises(UserError, match="other only in val/"):
        VideoFolder(str(tmp_path), batch_size=2).setup("fit")
