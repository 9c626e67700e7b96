"""The commands on images: what they write, and what they refuse in one line."""

import csv
import importlib.util
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vision  # noqa: F401  registers the models
from core.cli import main, run
from core.errors import UserError
from vision.benchmark import benchmark
from vision.convert import convert, find_model
from vision.evaluate import evaluate, match_classes
from vision.explain import area, contributions, explain
from vision.export import export, plain_program
from vision.models.loading import read
from vision.module import our_models
from vision.predict import predict
from vision.trained import Trained, load_trained

KWARGS = "{patch_size: 8, img_size: 16, embed_dim: 16, depth: 1, d_state: 4}"


def pictures(root, parts=("train", "val"), count=4, size=(16, 16)):
    """Reds and greens: what even one step learns."""
    rng = np.random.default_rng(0)
    for part in parts:
        for channel, name in enumerate(("green", "red")):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (*size, 3), dtype=np.uint8)
                pixels[..., 1 - channel] += 150
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of vision.train on reds and greens, and its pictures."""
    root = tmp_path_factory.mktemp("commands")
    pictures(root / "data")
    main(
        "vision", "vision.module.Classifier", "vision.data.ImageData",
        choose_data=True, links={"data.num_classes": "model.num_classes"},
        argv=[
            "cifar10_vim", "--data.root", str(root / "data"), "--data.batch_size", "4", "--data.padding", "1",
            "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_epochs", "12",
            "--model.kwargs", KWARGS, "--model.mixup", "null", "--ema_decay", "null", "--run_dir", str(root / "run"),
            "--model.schedule.warmup_epochs", "1", "--model.optimizer.lr", "1e-2", "--data.erasing", "0",
            "--test_after_fit", "false",
        ],
    )  # fmt: skip
    return root


def refused(capsys, function, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(function, argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("error:") == 1
    return error


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_evaluate_counts_classes_and_lists_predictions(trained, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(trained / "run"), str(trained / "data"), "--device", "cpu", "--num_workers", "0"]
    run(evaluate, [*arguments, "--batch_size", "3", "--out", str(out)])
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["images"] == 8
    assert metrics["top1"] > 0.7
    predictions = rows(out / "predictions.csv")
    assert metrics["top1"] == np.mean([row["class"] == row["prediction"] for row in predictions])
    assert [row["class"] for row in predictions] == ["green"] * 4 + ["red"] * 4
    assert {row["class"] for row in rows(out / "classes.csv")} == {"green", "red"}
    assert "<h2>Confusion matrix" in (out / "report.html").read_text()
    assert (out / "confusion.png").is_file()


def test_evaluate_refuses_a_damaged_file_or_leaves_it_out(trained, tmp_path, capsys):
    pictures(tmp_path / "data", ("",))
    (tmp_path / "data" / "red" / "bad.png").write_text("no image")
    arguments = [str(trained / "run"), str(tmp_path / "data"), "--num_workers", "0", "--device", "cpu"]
    error = refused(capsys, evaluate, *arguments, "--out", str(tmp_path / "none"))
    assert "bad.png: not an image" in error
    assert "--skip_unreadable true" in error
    assert not (tmp_path / "none").exists()
    run(evaluate, [*arguments, "--skip_unreadable", "true", "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == 8
    assert "bad.png" in (tmp_path / "out" / "report.html").read_text()


def test_evaluate_matches_classes_by_name():
    net = timm.create_model("test_vim", num_classes=3, device="meta")
    model = Trained(net, "test", ["a", "b", "c"], {}, 3)
    assert match_classes(["c", "a"], model) == [2, 0]
    with pytest.raises(UserError, match="the model doesn't know: d"):
        match_classes(["a", "d"], model)
    model.classes = None
    assert match_classes(["x", "y", "z"], model) == [0, 1, 2]
    with pytest.raises(UserError, match=r"got 2 class folders .* wanted 3"):
        match_classes(["x", "y"], model)
    imagenet = Trained(timm.create_model("test_vim", device="meta"), "test", None, {}, 3)
    assert match_classes(["n01443537", "n01440764"], imagenet) == [1, 0]
    assert imagenet.describe(1).startswith("goldfish")


def test_predict_prints_and_writes_the_best_classes(trained, tmp_path, capsys):
    out = tmp_path / "out"
    red = trained / "data" / "val" / "red"
    run(predict, [str(red / "0.png"), str(red / "1.png"), "--model", str(trained / "run"), "--top_k", "2", "--device",
                  "cpu", "--out", str(out)])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("0.png")
    assert lines[1].endswith("%  red")
    assert lines[-1] == str(out)
    found = rows(out / "predictions.csv")
    assert [(row["rank"], row["class"]) for row in found] == [("1", "red"), ("2", "green")] * 2
    assert float(found[0]["probability"]) + float(found[1]["probability"]) == pytest.approx(1)
    assert (out / "report.html").read_text().count("<img") == 2


def test_predict_refuses_in_one_line(trained, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_text("no image")
    good = str(trained / "data" / "val" / "red" / "0.png")
    assert "bad.jpg: not an image" in refused(capsys, predict, str(tmp_path / "bad.jpg"))
    assert "no such file" in refused(capsys, predict, str(tmp_path / "gone.jpg"))
    assert "give a file with --weights" in refused(capsys, predict, good, "--model", "test_vim")
    assert "did you mean vim_tiny_patch16_224" in refused(capsys, predict, good, "--model", "vim_tiny_patch16_22")
    assert "the file with --weights a.pth" in refused(capsys, predict, good, "--model", "a.pth")
    assert "no checkpoint in it" in refused(capsys, predict, good, "--model", str(tmp_path))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "not a checkpoint of vision.train" in refused(capsys, predict, good, "--model", str(tmp_path / "other.ckpt"))
    assert refused(capsys, predict) == "error: required: images; --help lists all\n"


def test_predict_takes_a_name_with_a_file_of_weights(trained, tmp_path, capsys):
    net = timm.create_model("test_vim", num_classes=3)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    loaded = load_trained("test_vim", str(tmp_path / "w.pth"))
    assert loaded.num_classes == 3
    assert loaded.size == 160
    assert torch.equal(loaded.net.state_dict()["pos_embed"], net.pos_embed)


def test_benchmark_writes_a_row_for_each_measurement(tmp_path, capsys):
    run(benchmark, ["test_vim", "test_mamba_nd_3d", "--img_size", "[32,33]", "--batch_size", "[2]", "--seconds", "0.01",
                    "--precision", "fp32", "--device", "cpu", "--out", str(tmp_path / "out")])  # fmt: skip
    found = rows(tmp_path / "out" / "benchmark.csv")
    assert [(r["model"], r["mode"], r["img_size"]) for r in found] == [
        (name, mode, size)
        for name in ("test_vim", "test_mamba_nd_3d") for size in ("32", "33") for mode in ("infer", "train")
    ]  # fmt: skip
    assert all(float(r["images_per_s"]) > 0 for r in found if r["img_size"] == "32" or r["model"] != "test_vim")
    assert "don't tile" in found[2]["note"]  # a size that the model refuses loses this row alone
    assert found[2]["images_per_s"] == ""
    assert "did you mean" in refused(capsys, benchmark, "test_vom")
    assert "--batch_size is [0]" in refused(capsys, benchmark, "test_vim", "--batch_size", "[0]")


def official(name, path):
    """A published file of a model: weights under the published names."""
    weights = timm.create_model(name, num_classes=5).state_dict()
    if name.startswith("plain_mamba"):
        weights = {"backbone." + k if not k.startswith("head") else k: v for k, v in weights.items()}
        weights = {k.replace("head.", "head.fc.").replace(".mixer.", ".mamba.").replace("norm_f", "ln1"): v
                   for k, v in weights.items()}  # fmt: skip
    torch.save({"state_dict" if "local" in name else "model": weights}, path)
    return weights


@pytest.mark.parametrize("name", ["vim_tiny_patch16_stride8_224", "plain_mamba_l1"])
def test_convert_finds_the_model_and_timm_loads_the_file(name, tmp_path, capsys):
    official(name, tmp_path / "weights.pth")
    run(convert, [str(tmp_path / "weights.pth")])
    assert f"timm.create_model('{name}', num_classes=5" in capsys.readouterr().out
    target = tmp_path / "weights.safetensors"
    model = timm.create_model(name, num_classes=5, checkpoint_path=str(target))
    converted = read(target)
    assert set(converted) == set(model.state_dict())
    assert all(torch.equal(value, converted[key]) for key, value in model.state_dict().items())
    assert "exists; name another" in refused(capsys, convert, str(tmp_path / "weights.pth"))


@pytest.mark.slow
def test_convert_refuses_foreign_files(tmp_path, capsys):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    assert "no model has its names and shapes" in refused(capsys, convert, str(tmp_path / "resnet.pth"))
    official("vim_tiny_patch16_224", tmp_path / "vim.pth")
    error = refused(capsys, convert, str(tmp_path / "vim.pth"), "--model", "plain_mamba_l1")
    assert "--model plain_mamba_l1: pos_embed: got 197 rows" in error
    (tmp_path / "text.pth").write_text("no weights")
    assert "not a file of weights" in refused(capsys, convert, str(tmp_path / "text.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("name", our_models())
def test_convert_finds_every_model(name, tmp_path):
    weights = timm.create_model(name, num_classes=7).state_dict()
    found, state, classes = find_model(weights, tmp_path / "weights.pth", None)
    assert (found, classes) == (name, 7)
    assert all(torch.equal(state[key], value) for key, value in weights.items())


def test_explain_draws_field_and_routes(trained, tmp_path, capsys):
    out = tmp_path / "out"
    red = str(trained / "data" / "val" / "red")
    run(explain, [str(trained / "run"), "--images", f"[{red}]", "--count", "2", "--device", "cpu", "--out", str(out)])
    assert {"receptive_field.png", "receptive_field.csv", "routes.png", "report.html"} <= {
        p.name for p in out.iterdir()
    }
    field = np.loadtxt(out / "receptive_field.csv", delimiter=",")
    assert field.shape == (16, 16)
    assert (field >= 0).all()
    areas = json.loads((out / "metrics.json").read_text())
    assert 0 < areas["area/0.2"] <= areas["area/0.5"] <= areas["area/0.99"] <= 1
    run(explain, ["test_vmamba", "--random", "true", "--count", "1", "--img_size", "64", "--device", "cpu",
                  "--out", str(tmp_path / "vmamba")])  # fmt: skip
    assert (tmp_path / "vmamba" / "routes.png").is_file()
    assert "--count is 0" in refused(capsys, explain, "test_vim", "--count", "0")


def test_contributions_are_the_gradient_of_the_middle():
    class Shift(torch.nn.Module):
        def forward_intermediates(self, x, indices, intermediates_only):
            return [2 * x.roll(1, 3)]

    field = contributions(Shift(), torch.rand(1, 3, 8, 8))
    assert field.nonzero().tolist() == [[4, 3]]
    assert float(field[4, 3]) == 6
    uniform = torch.ones(8, 8, dtype=torch.float64)
    assert area(uniform, 0.99) == 1
    assert area(uniform, 0.1) == 9 / 64


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (
        "test_vim", "test_plain_mamba", "test_mamba_nd_2d", "test_mamba_nd_3d", "test_vmamba", "test_vmamba_m2",
        "test_local_vmamba", "test_efficient_vmamba",
    )
]  # fmt: skip


@pytest.mark.parametrize("name", ["test_local_vim_cls", *SLOW])
def test_export_leaves_plain_operators_alone(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3).eval()
    with torch.no_grad():
        program = plain_program(net, torch.rand(2, 3, 48, 64), dynamic_batch=True)
        assert not [n for n in program.graph.nodes if "triscan" in str(n.target)]
        for count in (1, 3):
            image = torch.rand(count, 3, 48, 64)
            torch.testing.assert_close(program.module()(image), net(image), rtol=1e-4, atol=1e-5)


def test_export_writes_a_program_that_needs_nothing_of_ours(tmp_path, capsys):
    run(export, ["test_plain_mamba", "--random", "true", "--img_size", "32", "--format", "torch",
                 "--dynamic_batch", "true", "--out", str(tmp_path / "o")])  # fmt: skip
    program = torch.export.load(tmp_path / "o" / "model.pt2")
    assert program.module()(torch.rand(5, 3, 32, 32)).shape == (5, 1000)
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["torch/difference"] < 1e-5
    if importlib.util.find_spec("onnx") is None:
        assert "pip install onnx" in refused(capsys, export, "test_vim", "--random", "true")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vim", "test_vmamba_m2"])
def test_export_to_onnx_runs_there(name, tmp_path):
    run(export, [name, "--random", "true", "--img_size", "32", "--format", "onnx", "--dynamic_batch", "true",
                 "--out", str(tmp_path / "o")])  # fmt: skip
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["onnx/difference"] < 1e-4


def masks(root, count=4):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for i in range(count):
            pixels, mask = rng.integers(0, 60, (40, 48, 3), dtype=np.uint8), np.zeros((40, 48), np.uint8)
            top, left = rng.integers(0, 20, 2)
            pixels[top : top + 18, left : left + 18] += 150
            mask[top : top + 18, left : left + 18] = 1
            mask[0] = 255
            Image.fromarray(pixels).save(root / part / "images" / f"{i}.jpg")
            Image.fromarray(mask).save(root / part / "masks" / f"{i}.png")


def segment(*argv: str) -> None:
    main(
        "vision", "vision.segmenter.Segmenter", "vision.masks.MaskFolder", command="segment",
        links={"data.num_classes": "model.num_classes"}, folder="vision/segment", argv=argv,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["test_vmamba", "test_local_vim"])
def test_segment_trains_on_images_and_masks(name, tmp_path):
    masks(tmp_path / "data")
    out = tmp_path / "run"
    segment(
        "masks", "--data.root", str(tmp_path / "data"), "--data.img_size", "32", "--data.batch_size", "4",
        "--data.num_workers", "0", "--model.name", name, "--model.kwargs", "{}", "--model.head_dim", "16",
        "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", "2",
        "--run_dir", str(out),
    )  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["test/mean_iou"] <= 1
    assert "<h2>Test images" in (out / "report.html").read_text()


def test_segment_refuses_in_one_line(tmp_path, capsys):
    masks(tmp_path)
    (tmp_path / "val" / "masks" / "1.png").unlink()
    common = ("masks", "--data.root", str(tmp_path), "--data.num_workers", "0", "--model.name", "test_vmamba",
              "--model.kwargs", "{}", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true",
              "--data.batch_size", "4", "--run_dir", str(tmp_path / "run"))  # fmt: skip
    for fault, message in ((None, "1.png: no such mask (1 of 4 are missing)"), (9, "got class 9, wanted 0 to 1")):
        if fault is not None:
            mask = np.full((40, 48), fault, np.uint8)
            Image.fromarray(mask).save(tmp_path / "val" / "masks" / "1.png")
        with pytest.raises(SystemExit) as stop:
            segment(*common, "--trainer.max_steps", "1")
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_help_names_arguments_and_defaults(capsys):
    for function in (evaluate, predict, benchmark, convert, explain, export):
        with pytest.raises(SystemExit) as stop:
            run(function, ["--help"])
        assert not stop.value.code
        text = capsys.readouterr().out
        assert "default:" in text
        assert "--overwrite" in text


def test_folders_are_numbered(trained, tmp_path, monkeypatch, capsys):
    red = trained / "data" / "val" / "red" / "0.png"
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        run(predict, [str(red), "--model", str(trained / "run"), "--device", "cpu"])
        assert capsys.readouterr().out.splitlines()[-1] == f"runs/vision/predict/{number}"
