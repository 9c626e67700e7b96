"""Shows what a backbone looks at: ``python -m vision.explain MODEL`` draws receptive field and scan routes."""

import json
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from core.cli import run
from core.env import device_name, find_device
from core.errors import UserError
from core.training.report import Report, write_atomically
from vision.command import output_folder, steps
from vision.files import read_image
from vision.module import draw_routes
from vision.predict import find_images
from vision.trained import load_trained

SHARES = (0.2, 0.3, 0.5, 0.99)


def explain(
    model: str,
    images: list[str] | None = None,
    weights: str | None = None,
    random: bool = False,
    img_size: int | None = None,
    count: int = 16,
    seed: int = 0,
    device: str = "auto",
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the effective receptive field and the scan routes as pictures, and a page, report.html.

    The effective receptive field (Luo et al. 2016; for VMamba Liu et al. 2024, section 5.2) is the mean over images of
    how much each pixel moves the feature in the middle of the last map: the gradient's size, summed over colours.

    Args:
        model: A run's folder, a checkpoint (.ckpt) of vision.train, or the name of a model of timm.
        images: Image files or folders to take the mean over, as in [a.jpg,photos]; noise without them.
        weights: With a name: a file of weights instead of the published ones.
        random: With a name: leave the weights at random, to see the architecture alone.
        img_size: Side of the images instead of the model's own, in pixels.
        count: Images at most.
        seed: Of the noise and of random weights.
        device: cpu, cuda, or auto for the GPU if there is one.
        out: Folder to write to instead of the next one in runs/vision/explain.
        overwrite: Replace what an earlier run has written to that folder.
    """
    if count < 1:
        raise UserError(f"--count is {count}, wanted at least 1")
    place = find_device(device)
    torch.manual_seed(seed)
    paths = find_images(images)[:count] if images else []
    trained = load_trained(model, weights, img_size, random)
    shape = (trained.in_chans, trained.size, trained.size)
    transform, net = trained.transform(), trained.net.to(place)
    pictures = (transform(read_image(path, trained.mode)) for path in paths) if paths else (
        torch.randn(shape) for _ in range(count)
    )  # fmt: skip
    total = len(paths) or count
    with output_folder("explain", out, overwrite) as folder:
        field = torch.zeros(trained.size, trained.size, dtype=torch.float64)
        for picture in steps(pictures, total, "images"):
            field += contributions(net, picture.unsqueeze(0).to(place)).cpu() / total
        shares = {f"{share:.0%} of the gradient": area(field, share) for share in SHARES}
        report = Report(
            "vision explain", f"{shares['50% of the gradient']:.1%}", "of the image holds half the gradient"
        )
        figure = draw_field(field)
        figure.savefig(folder / "receptive_field.png", dpi=144)
        report.figure("Effective receptive field", figure, f"Mean over {total} images, scaled by its fourth root.")
        report.facts("Smallest square around the middle", {k: f"{v:.2%} of the image" for k, v in shares.items()})
        if (routes := draw_routes(net)) is not None:
            routes.savefig(folder / "routes.png", dpi=144)
            report.figure("Scan routes", routes, "From dark to bright; the star is the class token.")
        report.facts("Model", {"model": trained.label, "pixels": trained.size, "device": device_name(place)})
        report.write(folder / "report.html")
        np.savetxt(folder / "receptive_field.csv", field.numpy(), "%.6g", ",")
        figures = {f"area/{share}": area(field, share) for share in SHARES}
        write_atomically(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")


def contributions(net: nn.Module, image: Tensor) -> Tensor:
    """How much each pixel of an image (1, C, H, W) moves the middle of the last map, (H, W) float64."""
    image = image.clone().requires_grad_()
    tokens = last_map(net, image)
    tokens[0, :, tokens.shape[2] // 2, tokens.shape[3] // 2].sum().backward()
    assert image.grad is not None
    return image.grad[0].abs().double().sum(0)


def last_map(net: nn.Module, image: Tensor) -> Tensor:
    """The last feature map (B, D, H, W) of a backbone of timm.

    Raises:
        UserError: If the model has no maps.
    """
    forward: Any = getattr(net, "forward_intermediates", None)
    if forward is not None:
        features = forward(image, indices=1, intermediates_only=True)[-1]
    else:
        features = net.forward_features(image)  # type: ignore[operator]
    if features.ndim != 4:
        raise UserError(f"{type(net).__name__}: its features are {tuple(features.shape)}, wanted a map (B, D, H, W)")
    return features


def area(field: Tensor, share: float) -> float:
    """Part of the image in the smallest square around the middle that holds ``share`` of the whole field."""
    height, width = field.shape
    whole = float(field.sum())
    for radius in range(max(height, width)):
        top, left = max(0, height // 2 - radius), max(0, width // 2 - radius)
        part = field[top : height // 2 + radius + 1, left : width // 2 + radius + 1]
        if float(part.sum()) >= share * whole * (1 - 1e-9):
            return part.numel() / field.numel()
    return 1.0


def draw_field(field: Tensor) -> Figure:
    """The field as a picture, scaled by its fourth root so that weak contributions show."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow((field / field.max().clamp_min(1e-300)).pow(0.25).numpy(), cmap="magma", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.colorbar(shown)
    return figure


if __name__ == "__main__":
    run(explain)
