"""Folders of video clips, each a file of frames (.npz, .npy) or a folder of images.

Dimension letters: B batch, C channels, T frames, H W height and width in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from core.errors import UserError
from vision.data import ImageFolder, to_pixels
from vision.files import EXTENSIONS, Unreadable, read_image

__all__ = ["ClipAugmentation", "ClipFiles", "VideoFolder", "find_clips", "read_frames", "sample_frames"]

ARRAYS = (".npz", ".npy")
LAYOUT = (
    "wanted clips in CLASS/: folders of frames (CLASS/CLIP/0001.jpg, ... in the order of their names), or arrays "
    "CLASS/CLIP.npz or .npy of (T, height, width, 3) uint8"
)


@dataclass
class ClipAugmentation:
    """Augmentation of training clips, the same for all frames of one.

    Args:
        scale: Smallest and largest part of the area that a random crop takes.
        horizontal_flip: Probability; 0 where left and right make a difference to the class.
    """

    scale: tuple[float, float] = (0.4, 1.0)
    horizontal_flip: float = 0.5


class VideoFolder(ImageFolder):
    """Clips in folders: ROOT/train/CLASS/CLIP and ROOT/val/CLASS/CLIP, perhaps ROOT/test/CLASS/CLIP.

    A clip is a folder of frames (images, in the order of their names) or an array CLIP.npz or CLIP.npy, (T, height,
    width, 3) uint8 (of a .npz file the first array). Batches are (B, 3, T, H, W) float32, normalised. Training takes
    frames from anywhere in the clip, evaluation from its middle. To make frames of a video file:
    ``ffmpeg -i CLIP.mp4 -vf fps=8,scale=-2:256 CLIP/%05d.jpg``.

    Args:
        root: The folder.
        img_size: Side of the frames that the model gets, in pixels.
        num_frames: T, frames that the model gets. A clip that is too short repeats its last one.
        frame_stride: From one of these frames to the next, in frames of the clip.
        batch_size: Clips per step and device.
        num_workers: Processes that read clips, per device; None is one per CPU core, 8 at most.
        augmentation: Augmentation of the training clips.
        crop_pct: Part of the resized frame's side that evaluation's centre crop keeps.
        skip_unreadable: Leave out clips that cannot be read, and list them in the report; otherwise they are an error.
        mean: Per channel, subtracted from pixels between 0 and 1.
        std: Per channel, which they are then divided by.
    """

    def __init__(
        self,
        root: str | None = None,
        img_size: int = 224,
        num_frames: int = 16,
        frame_stride: int = 1,
        batch_size: int = 8,
        num_workers: int | None = None,
        augmentation: ClipAugmentation = ClipAugmentation(),  # noqa: B008  read only; the recipe's options replace it
        crop_pct: float = 0.875,
        skip_unreadable: bool = False,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__(
            root, img_size, batch_size, num_workers, crop_pct=crop_pct, interpolation="bilinear",
            skip_unreadable=skip_unreadable, mean=mean, std=std,
        )  # fmt: skip
        self.num_frames, self.frame_stride, self.clip_augmentation = num_frames, frame_stride, augmentation

    def to_pixels(self, image: Tensor) -> np.ndarray:
        """The middle frame of a normalised clip (C, T, H, W) as uint8 pixels, (H, W, 3)."""
        return to_pixels(image[:, image.shape[1] // 2], self.mean, self.std)

    def setup(self, stage: str) -> None:
        """Lists the clips."""
        if min(self.num_frames, self.frame_stride) < 1:
            raise UserError(
                f"--data.num_frames {self.num_frames}, --data.frame_stride {self.frame_stride}: wanted at least 1 each"
            )
        for name, folder in self.folders.items():
            self.images.setdefault(name, find_clips(folder, self.class_names))
        if len(self.images["train"]) < self.batch_size:
            raise UserError(
                f"{self.folders['train']}: got {len(self.images['train'])} clips, wanted at least one batch of "
                f"{self.batch_size}; give a smaller --data.batch_size"
            )

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented; the last, smaller batch is left out."""
        options = self.clip_augmentation
        steps = [
            v2.RandomResizedCrop(self.img_size, scale=options.scale, antialias=True),
            v2.RandomHorizontalFlip(options.horizontal_flip),
        ]
        return self._loader(self._clips("train", steps, random=True), shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order, centre crops of the middle frames."""
        return self._loader(self._clips("val", self._centre(), random=False))

    def test_dataloader(self) -> DataLoader:
        """In order, centre crops of the middle frames; of val/ if there is no test/."""
        return self._loader(self._clips("test" if "test" in self.images else "val", self._centre(), random=False))

    def _centre(self) -> list[Any]:
        side = round(self.img_size / self.crop_pct)
        return [v2.Resize(side, antialias=True), v2.CenterCrop(self.img_size)]

    def _clips(self, part: str, steps: list[Any], random: bool) -> Dataset:
        normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]
        transform = v2.Compose([*steps, *normalise])
        return ClipFiles(self.images[part], self.num_frames, self.frame_stride, random, transform)


class ClipFiles(Dataset):
    """Clips read from files; one that cannot be read comes out as ``Unreadable``.

    Args:
        clips: Paths and class numbers.
        num_frames: T.
        stride: From one frame to the next.
        random: Whether frames come from anywhere in the clip, not from its middle.
        transform: From frames (T, C, height, width) uint8 to (T, C, H, W) float32.
    """

    def __init__(
        self,
        clips: Sequence[tuple[Path, int]],
        num_frames: int,
        stride: int,
        random: bool,
        transform: Callable[[Tensor], Tensor],
    ) -> None:
        self.clips, self.num_frames, self.stride = clips, num_frames, stride
        self.random, self.transform = random, transform

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        path, label = self.clips[index]
        try:
            frames = read_frames(path, lambda count: sample_frames(count, self.num_frames, self.stride, self.random))
        except UserError as error:
            return Unreadable(str(path), str(error).removeprefix(f"{path}: "))
        return self.transform(frames).transpose(0, 1), label


def find_clips(part: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """All clips of a part with their class numbers, sorted.

    Raises:
        UserError: If a class has no clip.
    """
    found = []
    for number, name in enumerate(classes):
        entries = sorted(p for p in (part / name).iterdir() if p.name[0] != ".")
        paths = [p for p in entries if p.is_dir() or p.suffix.lower() in ARRAYS]
        if not paths:
            got = f"got {', '.join(p.name for p in entries[:4])}" if entries else "it is empty"
            raise UserError(f"{part / name}: no clip in it, {got}; {LAYOUT}")
        found += [(path, number) for path in paths]
    return found


def sample_frames(count: int, wanted: int, stride: int, random: bool) -> list[int]:
    """Which of ``count`` frames a model gets: ``wanted`` of them, every ``stride``; too short a clip repeats its last.

    The first one is drawn from torch's generator if ``random``, else the frames lie in the middle.
    """
    spare = max(0, count - ((wanted - 1) * stride + 1))
    start = int(torch.randint(spare + 1, ())) if random else spare // 2
    return [min(start + i * stride, count - 1) for i in range(wanted)]


def read_frames(path: Path, choose: Callable[[int], list[int]]) -> Tensor:
    """Frames of a clip, (T, 3, height, width) uint8; ``choose`` gets their number and says which.

    Raises:
        UserError: Naming the clip or the frame, if it cannot be read or is of another layout.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS and p.name[0] != ".")
        if not files:
            raise UserError(f"{path}: no frame in it; {LAYOUT}")
        frames = [np.asarray(read_image(files[i])) for i in choose(len(files))]
        if len({frame.shape for frame in frames}) > 1:
            raise UserError(f"{path}: got frames of several sizes, wanted one size")
        pixels = np.stack(frames)
    else:
        pixels = _read_array(path)
        pixels = pixels[choose(len(pixels))]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)


def _read_array(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        pixels = loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
    except Exception as error:  # zipfile's, NumPy's and the system's own exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not an array of frames ({reason}); {LAYOUT}") from error
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8 or not len(pixels):
        raise UserError(f"{path}: got an array {pixels.shape} of {pixels.dtype}; {LAYOUT}")
    return pixels
