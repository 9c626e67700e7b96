"""Exports a model for use without this project: ``python -m vision.export MODEL`` writes .pt2 and .onnx files."""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.cli import run
from core.errors import UserError
from core.training.report import Report, write_atomically
from kernels.depthwise_conv2d.reference import conv
from kernels.gelu_mlp import plain as perceptron
from vision.command import output_folder
from vision.models import local_mixer, nd_block, snake_mixer
from vision.routes import scan_routes
from vision.trained import count_parameters, load_trained

PACKAGES = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}
CHUNK = 1 << 14  # scan positions that are written out at once: few operators, and memory that kernels/ bounds
TOLERANCE = 1e-3  # of the largest output: float32 in another order of operations


def export(
    model: str,
    weights: str | None = None,
    random: bool = False,
    img_size: int | None = None,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    format: Literal["both", "torch", "onnx"] = "both",
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as plain operators: model.pt2 (torch.export) and model.onnx, each checked against the model.

    The files need neither this project nor a GPU. Their images have the size that is given here, as the scan is written
    out along its positions, and so many come at a time, or any number. model.pt2 is read by
    ``torch.export.load("model.pt2").module()``.

    Args:
        model: A run's folder, a checkpoint (.ckpt) of vision.train, or the name of a model of timm.
        weights: With a name: a file of weights instead of the published ones.
        random: With a name: leave the weights at random.
        img_size: Side of the images instead of the model's own, in pixels.
        batch_size: Images at a time.
        dynamic_batch: Take any number of images at a time; ``batch_size`` and one more are checked.
        format: torch, onnx (which needs onnx and onnxscript, and onnxruntime to be checked), or both.
        out: Folder to write to instead of the next one in runs/vision/export.
        overwrite: Replace what an earlier run has written to that folder.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size is {batch_size}, wanted at least 1")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if format != "torch" and set(missing) - {"onnxruntime"}:
        raise UserError(
            f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}; or export with --format torch alone"
        )
    trained = load_trained(model, weights, img_size, random)
    image = torch.rand(batch_size + dynamic_batch, trained.in_chans, trained.size, trained.size)
    checked = [image, image[:-1]] if dynamic_batch else [image]
    facts: dict[str, Any] = {
        "model": trained.label, "parameters": f"{count_parameters(trained.net):,}",
        "input": str(("any number" if dynamic_batch else batch_size, *image.shape[1:])),
        "torch": torch.__version__,
    }  # fmt: skip
    figures: dict[str, float] = {}
    with output_folder("export", out, overwrite) as folder, torch.no_grad():
        wanted = [trained.net(x) for x in checked]
        program = plain_program(trained.net, image, dynamic_batch)
        facts["operators"] = len(program.graph.nodes)
        module = program.module()
        figures["torch/difference"] = _compare("model.pt2", [module(x) for x in checked], wanted)
        if format != "onnx":
            torch.export.save(program, folder / "model.pt2")
        if format != "torch":
            _write_onnx(program, folder / "model.onnx")
            if "onnxruntime" in missing:
                print("model.onnx is not checked: pip install onnxruntime")
            else:
                figures["onnx/difference"] = _compare("model.onnx", _run_onnx(folder / "model.onnx", checked), wanted)
        files = {path.name: f"{path.stat().st_size / 2**20:.1f} MiB" for path in sorted(folder.glob("model.*"))}
        report = Report("vision export", ", ".join(files), "written")
        report.facts("Files", files)
        report.facts("Checks", {k: f"{v:.2g} of the largest output" for k, v in figures.items()})
        report.facts("Model", facts)
        report.write(folder / "report.html")
        write_atomically(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")
        print("  ".join(f"{name} {size}" for name, size in files.items()))


def plain_program(net: nn.Module, image: Tensor, dynamic_batch: bool = False) -> torch.export.ExportedProgram:
    """A model as an exported program of ATen operators alone, for images of one size.

    Args:
        net: The model.
        image: Images (B, C, H, W) of that size; two at least with ``dynamic_batch``, as tracers take 1 for a constant.
        dynamic_batch: Whether the program takes any number of them.
    """
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    table = torch.export.default_decompositions()
    table.update(plain_operators())  # type: ignore[arg-type]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(net.eval(), (image,), dynamic_shapes=shapes).run_decompositions(table)


def plain_operators() -> dict[Any, Callable[..., Any]]:
    """What each of our operators is in ATen's."""
    ops = torch.ops.triscan
    return {
        ops.selective_scan.default: _scan,
        ops.causal_conv1d.default: _conv,
        ops.norm.default: _norm,
        ops.gelu_mlp.default: perceptron,
        ops.depthwise_conv2d.default: lambda x, weight, bias, act, _: conv(x, weight, bias, act),
        ops.ssd.default: _ssd,
        ops.scan_routes.default: lambda x, names, h, w, token: scan_routes(names.split(","), h, w, token),
        ops.axis_order.default: lambda x, grid, order: nd_block.axis_order.build(
            tuple(grid), tuple(order), torch.device("cpu")
        ),
        ops.snake_tables.default: lambda x, h, w: snake_mixer.snake_tables.build(h, w, torch.device("cpu")),
        ops.rotation.default: lambda x, h, w, dim, length: local_mixer.rotation_table.build(
            h, w, dim, length, x.dtype, torch.device("cpu")
        ),
    }


def _scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.selective_scan import aten
    from kernels.selective_scan.problem import make_problem

    *problem, keep, _ = arguments
    y, state = aten.scan(make_problem(*problem), chunk=CHUNK)
    return y, state if keep else y.new_empty(0), y.new_empty(0)


def _conv(*arguments: Any) -> tuple[Tensor, Tensor]:
    from kernels.causal_conv1d import aten
    from kernels.causal_conv1d.problem import make_problem

    *problem, keep, _ = arguments
    p = make_problem(*problem)
    y, state = aten.conv(p)
    return y.reshape(p.y_shape), state.reshape(p.state_shape) if keep else y.new_empty(0)


def _norm(*arguments: Any) -> tuple[Tensor, ...]:
    from kernels.norm import reference
    from kernels.norm.problem import make_problem

    return reference.norm(make_problem(*arguments[:-1]))


def _ssd(*arguments: Any) -> tuple[Tensor, Tensor]:
    from kernels.ssd import aten
    from kernels.ssd.problem import make_problem

    *problem, keep, _ = arguments
    y, state = aten.scan(make_problem(*problem))
    return y, state if keep else y.new_empty(0)


def _compare(what: str, got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference in units of the largest output, over several inputs.

    Raises:
        UserError: If it is more than rounding.
    """
    difference = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(got, wanted, strict=True)
    )
    if not difference <= TOLERANCE:
        raise UserError(f"{what}: differs from the model by {difference:.2g} of its largest output, wanted {TOLERANCE}")
    return difference


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its optimizer takes minutes over thousands of nodes; runtimes have their own.
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    assert onnx is not None
    onnx.save(file)


def _run_onnx(file: Path, images: list[Tensor]) -> list[Tensor]:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for x in images]


if __name__ == "__main__":
    run(export)
