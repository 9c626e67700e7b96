"""The training command: recipes, a short run, its report, and what is refused."""

import json

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import vision  # noqa: F401  registers the models
from core.cli import CONFIGS, main
from core.errors import UserError
from vision.module import Classifier, MixupOptions, build, draw_confusion, draw_routes

SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "d_state": 4}


def command(*argv: str) -> None:
    main(
        "vision", "vision.module.Classifier", "vision.data.ImageData",
        choose_data=True, links={"data.num_classes": "model.num_classes"}, argv=argv,
    )  # fmt: skip


def refused(capsys, *argv: str) -> str:
    """The message of a command that a user's mistake ends."""
    with pytest.raises(SystemExit) as stop:
        command(*argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("error:") == 1
    return error


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONFIGS / "vision").glob("*.yaml")))
def test_recipes_parse_and_say_what_they_are(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        command(recipe, "--print_config")
    assert not stop.value.code
    assert "class_path: vision." in capsys.readouterr().out
    head = (CONFIGS / "vision" / f"{recipe}.yaml").read_text().split("seed_everything")[0]
    assert "# Run:     python -m vision.train " + recipe in head
    assert "# Expect:" in head


def test_recipes_name_models_that_take_their_arguments():
    for path in (CONFIGS / "vision").rglob("*.yaml"):
        model = yaml.safe_load(path.read_text())["model"]
        timm.create_model(model["name"], device="meta", **model.get("kwargs", {}))


def test_segment_recipe_parses(capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            "vision", "vision.segmenter.Segmenter", "vision.masks.MaskFolder", command="segment",
            links={"data.num_classes": "model.num_classes"}, folder="vision/segment", argv=["masks", "--print_config"],
        )  # fmt: skip
    assert not stop.value.code


def test_a_short_run_leaves_figures_and_a_report(tmp_path, capsys):
    out = tmp_path / "run"
    command("smoke", "--trainer.max_steps", "4", "--trainer.limit_val_batches", "1", "--run_dir", str(out))
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["test/accuracy"] <= metrics["test/top5"] <= 1
    assert 0.9 < metrics["baseline/logistic_regression"] < 1
    page = (out / "report.html").read_text()
    for title in ("Confusion matrix", "Mistakes", "Scan routes"):
        assert f"<h2>{title}" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(out)


def images(root, count=6):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(root / part / name / f"{i}.png")


FOLDER = [
    *("--data.img_size", "16", "--data.batch_size", "4", "--data.num_workers", "0", "--trainer.accelerator", "cpu"),
    *("--model.name", "test_vim", "--model.kwargs", "{patch_size: 8, img_size: 16, embed_dim: 16, depth: 2}"),
]


def test_imagenet_recipe_trains_on_a_folder_and_lists_what_it_left_out(tmp_path):
    images(tmp_path / "data")
    (tmp_path / "data" / "train" / "a" / "text.png").write_text("no image")
    out = tmp_path / "run"
    command(
        "imagenet", "--data.root", str(tmp_path / "data"), *FOLDER, "--data.skip_unreadable", "true",
        "--trainer.max_epochs", "1", "--run_dir", str(out),
    )  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["test/accuracy"] <= 1
    assert "test/top5" not in metrics  # two classes
    page = (out / "report.html").read_text()
    assert "Files left out" in page
    assert "text.png" in page


def test_text_named_png_is_refused_and_nothing_is_left(tmp_path, capsys):
    images(tmp_path / "data")
    bad = tmp_path / "data" / "val" / "b" / "text.png"
    bad.write_text("no image")
    out = tmp_path / "run"
    error = refused(capsys, "imagenet", "--data.root", str(tmp_path / "data"), *FOLDER, "--run_dir", str(out))
    assert f"{bad}: not an image" in error
    assert not out.exists()


def test_mistakes_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "data")
    root = ["--data.root", str(tmp_path / "data")]
    assert "ROOT/train/CLASS" in refused(capsys, "imagenet")
    assert "got nothing there" in refused(capsys, "imagenet", "--data.root", "nowhere")
    assert "did you mean vim_tiny_patch16_224" in refused(
        capsys, "imagenet", *root, "--model.name", "vim_tiny_patch16_24"
    )
    assert "depht" in refused(capsys, "imagenet", *root, "--model.kwargs", "{depht: 2}")
    assert "don't tile" in refused(capsys, "imagenet", *root, "--model.kwargs", "{img_size: 225}")
    assert "did you mean 'snake'" in refused(capsys, "imagenet", *root, "--model.kwargs", "{routes: [snak]}")
    assert "no such file" in refused(capsys, "imagenet", *root, "--model.weights", "vim.pth")
    (tmp_path / "vim.pth").write_text("no weights")
    assert "not a file of weights" in refused(capsys, "imagenet", *root, "--model.weights", "vim.pth")
    assert not (tmp_path / "runs").exists()


def test_weights_start_a_run(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vim", num_classes=10, **SMALL)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "vim.pth")
    same = build("test_vim", 10, SMALL, str(tmp_path / "vim.pth"))
    assert torch.equal(same.head.weight, model.head.weight)
    fewer = build("test_vim", 4, SMALL, str(tmp_path / "vim.pth"))
    assert fewer.head.weight.shape == (4, 16)
    assert torch.equal(fewer.pos_embed, model.pos_embed)
    with pytest.raises(UserError, match="not one of test_vim"):
        build("test_vim", 10, {**SMALL, "embed_dim": 24}, str(tmp_path / "vim.pth"))


def test_mixup_mixes_labels_and_spares_the_batch():
    torch.manual_seed(0)
    module = Classifier("test_vim", 10, SMALL, label_smoothing=0.1, mixup=MixupOptions())
    batch, labels = torch.rand(7, 1, 8, 8), torch.arange(7)
    before = batch.clone()
    module.loss((batch, labels)).backward()
    assert torch.equal(batch, before)
    assert all(p.grad is not None for p in module.net.parameters())


def test_loss_is_smoothed_cross_entropy():
    module = Classifier("test_vim", 10, SMALL, label_smoothing=0.2).eval()
    batch, labels = torch.rand(5, 1, 8, 8), torch.arange(5)
    logs = module.net(batch).log_softmax(1)
    truth = -(0.8 * logs[torch.arange(5), labels] + 0.2 * logs.mean(1)).mean()
    torch.testing.assert_close(module.loss((batch, labels)), truth)


def test_any_timm_model_goes():
    assert Classifier("test_vit", 3, {"img_size": 32}).net.num_classes == 3


def test_figures_draw():
    counts = np.diag([3, 2, 0])
    assert len(draw_confusion(counts, ["a", "b", "c"]).axes[0].texts) == 2
    model = timm.create_model("test_vim", routes=("snake", "columns"), **SMALL)
    assert [axes.get_title() for axes in draw_routes(model).axes] == ["snake", "columns"]
    titles = [axes.get_title() for axes in draw_routes(timm.create_model("test_mamba_nd_2d")).axes]
    assert titles == ["raster", "raster_reversed", "columns", "columns_reversed"]
    assert draw_routes(timm.create_model("test_mamba_nd_3d")) is None


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path):
    command("digits", "--run_dir", str(tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test/accuracy"] >= 0.97
    assert metrics["test/accuracy"] > metrics["baseline/logistic_regression"]


def test_graph_and_compile_exclude_each_other():
    with pytest.raises(UserError, match=r"--model\.graph and --model\.compile are both on"):
        Classifier("test_vim", 3, graph=True, compile=True)
