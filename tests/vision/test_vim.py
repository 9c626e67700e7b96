"""Vim: published numbers, parameter names, resolutions, checkpoints and refusals."""

import argparse

import pytest
import timm
import torch
from cases import golden_inputs, golden_state_dict, load_golden
from fill import check, fill_input

import vision  # noqa: F401  registers the models
from vision.models.patches import resample_positions
from vision.models.vim import Vim, checkpoint_filter_fn

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "d_state": 4, "num_classes": 5}


def small(**kwargs) -> Vim:
    torch.manual_seed(0)
    return Vim(**{**SMALL, **kwargs}).eval()


def test_golden_logits_features_and_gradients():
    golden = load_golden("vim_a")
    config = golden["config"]
    model = timm.create_model(
        "vim_tiny_patch16_224",
        **{
            key: config[key]
            for key in ("img_size", "patch_size", "stride", "depth", "embed_dim", "d_state", "num_classes")
        },
    )
    assert {name: list(p.shape) for name, p in model.state_dict().items()} == golden["params"]
    model.load_state_dict(golden_state_dict(golden))
    model.eval()
    seen = {}
    for i in (0, config["depth"] - 1):
        model.layers[i].register_forward_hook(
            lambda _, __, out, i=i: seen.update({f"layers.{i}.hidden": out[0], f"layers.{i}.residual": out[1]})
        )
    x = golden_inputs(golden)["x"].requires_grad_()
    y = model(x)
    check(y, golden["outputs"]["y"])
    seen["tokens"] = model.forward_features(x)
    assert seen.keys() == golden["outputs"]["features"].keys()
    for name, summary in golden["outputs"]["features"].items():
        check(seen[name], summary)
    (y * fill_input("loss_weight", y.shape)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    for name, summary in golden["grads"].items():
        check(grads[name], summary)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vim_tiny_patch16_224", 7.148),
        ("vim_tiny_patch16_stride8_224", 7.250),
        ("vim_small_patch16_224", 25.797),
        ("vim_small_patch16_stride8_224", 26.001),
        ("vim_base_patch16_224", 97.598),
    ],
)
def test_published_sizes(name, millions):
    model = timm.create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert model.default_cfg["hf_hub_id"].startswith("hustvl/")


def test_routes_have_parameters_of_their_own():
    model = small(routes=("raster", "columns", "snake_reversed"))
    names = {name for name, _ in model.layers[0].mixer.named_parameters()}
    assert {"A_log", "A_b_log", "A_2_log", "D", "D_b", "D_2", "conv1d.weight", "conv1d_b.weight"} <= names
    assert {"conv1d_2.weight", "x_proj_2.weight", "dt_proj_2.bias"} <= names
    model.train()(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_columns_are_raster_on_the_transposed_image(size):
    rows, columns = small(), small(routes=("columns", "columns_reversed"))
    columns.load_state_dict(rows.state_dict())
    with torch.no_grad():
        columns.patch_embed.proj.weight.copy_(rows.patch_embed.proj.weight.transpose(2, 3))
        middle = rows.patch_embed.num_patches // 2
        grid = torch.cat((rows.pos_embed[:, :middle], rows.pos_embed[:, middle + 1 :]), 1).view(4, 4, -1)
        grid = grid.transpose(0, 1).flatten(0, 1).unsqueeze(0)
        columns.pos_embed.copy_(
            torch.cat((grid[:, :middle], rows.pos_embed[:, middle : middle + 1], grid[:, middle:]), 1)
        )
    image = torch.rand(2, 3, *size)
    torch.testing.assert_close(columns(image.transpose(2, 3)), rows(image), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rows(image.transpose(2, 3)), rows(image), rtol=1e-2)


@pytest.mark.parametrize(
    "routes", [("raster",), ("windows3", "windows3_reversed"), ("atrous0", "atrous1", "atrous2", "atrous3")]
)
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (8, 8)])
def test_other_routes_and_sizes_run(routes, size):
    model = small(routes=routes)
    assert model(torch.rand(1, 3, *size)).isfinite().all()


def test_overlapping_patches():
    model = small(stride=4)
    assert model.patch_embed.grid_size == (7, 7)
    assert model.feature_info[0]["reduction"] == 4
    assert model.forward_features(torch.rand(1, 3, 40, 32)).shape == (1, 9 * 7 + 1, 32)
    assert model.forward_intermediates(torch.rand(1, 3, 40, 32), intermediates_only=True)[0].shape == (1, 32, 9, 7)


def test_the_stem_of_convolutions_takes_any_size():
    model = small(stem="conv", stride=2, global_pool="avg", routes=("raster", "columns"))
    assert model.grid_size == [16, 16]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    image = torch.randn(1, 3, 23, 40)
    tokens = model.forward_features(image)
    assert tokens.shape == (1, 12 * 20 + 1, 32)
    image[..., 30:] += 1  # a token sees its neighbourhood alone
    moved = (
        (model.patch_embed(image) - model.patch_embed(image - (torch.arange(40) >= 30).float())).abs().amax((0, 1, 3))
    )
    assert [i for i in range(20) if moved[i] > 0] == [*range(14, 20)]
    with pytest.raises(ValueError, match="stem: got 'none'"):
        small(stem="none")


def test_bfloat16_is_as_good_as_its_precision():
    model = small()
    image = torch.rand(4, 3, 32, 32)
    truth = model.double()(image.double())
    low = model.bfloat16()(image.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.double() - truth).abs().max() < 0.1 * truth.abs().max()


def test_drop_path_drops_whole_branches():
    model = small(drop_path_rate=0.5).train()
    image = torch.rand(1, 3, 32, 32).expand(64, -1, -1, -1)
    assert len(model(image).round(decimals=4).unique(dim=0)) == 2  # the last branch is dropped or not, the first never


def test_class_token_is_the_middle_row():
    model = small()
    tokens = model.forward_features(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(model.forward_head(tokens), model.head(tokens[:, 8]))
    model.reset_classifier(3, "avg")
    mean = (tokens.sum(1) - tokens[:, 8]) / 16
    torch.testing.assert_close(model.forward_head(tokens), model.head(mean))


# Positions.


def test_positions_stay_at_their_own_size():
    positions = torch.rand(1, 13, 6)
    assert torch.equal(resample_positions(positions, (3, 4), 3, 4), positions)


def smooth_positions(height, width):
    rows, columns = (torch.arange(n) + 0.5 for n in (height, width))
    patches = ((rows / height).unsqueeze(1) + 2 * (columns / width)).flatten()
    row = len(patches) // 2
    return torch.cat((patches[:row], torch.tensor([7.0]), patches[row:])).view(1, -1, 1)


@pytest.mark.parametrize("new", [(6, 8), (5, 5), (2, 9)])
def test_positions_keep_the_class_row_and_smooth_functions(new):
    got = resample_positions(smooth_positions(12, 12), (12, 12), *new)
    assert got.shape == (1, new[0] * new[1] + 1, 1)
    assert got[0, new[0] * new[1] // 2, 0] == 7
    torch.testing.assert_close(got, smooth_positions(*new), rtol=0, atol=0.06)


def test_positions_survive_the_round_trip():
    there = resample_positions(smooth_positions(12, 10), (12, 10), 30, 25)
    back = resample_positions(there, (30, 25), 12, 10)
    torch.testing.assert_close(back, smooth_positions(12, 10), rtol=0, atol=0.02)


# Checkpoints.


def official_file(path, model, **extra):
    """A file as the official training writes it: weights beside optimizer state and the run's options."""
    options = argparse.Namespace(model="vim", lr=1e-3)
    torch.save({"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 299, "args": options, **extra}, path)
    return {"file": str(path), "num_classes": model.num_classes}


def load(overlay, **kwargs):
    args = {**SMALL, **kwargs}
    return timm.create_model("vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **args).eval()


def test_official_checkpoint_loads(tmp_path):
    model = small()
    loaded = load(official_file(tmp_path / "vim.pth", model))
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(image), model(image), rtol=0, atol=0)


def test_checkpoint_adapts_to_classes_channels_and_size(tmp_path):
    overlay = official_file(tmp_path / "vim.pth", small())
    model = load(overlay, num_classes=3, in_chans=1, img_size=48)
    assert model(torch.rand(1, 1, 48, 48)).shape == (1, 3)
    wanted = resample_positions(small().pos_embed, (4, 4), 6, 6)
    torch.testing.assert_close(model.pos_embed, wanted, rtol=0, atol=0)
    with torch.no_grad():
        assert load(overlay, num_classes=0)(torch.rand(1, 3, 32, 32)).shape == (1, 32)


def test_fine_tuned_stride_resamples(tmp_path):
    model = load(official_file(tmp_path / "vim.pth", small()), stride=4)
    torch.testing.assert_close(model.pos_embed, resample_positions(small().pos_embed, (4, 4), 7, 7), rtol=0, atol=0)


def test_published_weights_win_over_averages():
    model, other = small(), small(d_conv=4)
    with torch.no_grad():
        other.cls_token.add_(1)
    checkpoint = {"model": model.state_dict(), "model_ema": other.state_dict()}
    assert torch.equal(checkpoint_filter_fn(checkpoint, model)["cls_token"], model.cls_token)
    assert torch.equal(checkpoint_filter_fn({"model_ema": other.state_dict()}, model)["cls_token"], other.cls_token)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dim": 48}, r"of another shape: cls_token \(1, 1, 48\) instead of \(1, 1, 32\)"),
        ({"depth": 3}, "unexpected: layers.2"),
        ({"depth": 1}, "missing: layers.1"),
    ],
)
def test_checkpoint_of_another_model_is_refused_in_one_message(tmp_path, kwargs, message):
    overlay = official_file(tmp_path / "vim.pth", small(**kwargs))
    with pytest.raises(ValueError, match=message) as error:
        load(overlay)
    assert "not one of vim_tiny_patch16_224" in str(error.value)
    assert len(str(error.value)) < 800


def test_no_network_unless_pretrained(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    timm.create_model("vim_tiny_patch16_224", device="meta")


# Refusals.


@pytest.mark.parametrize("size", [(33, 32), (32, 20), (4, 32)])
def test_image_that_patches_do_not_tile(size):
    with pytest.raises(ValueError, match=rf"got {size[0]} x {size[1]} pixels.* don't tile.*resize"):
        small()(torch.rand(1, 3, *size))
    with pytest.raises(ValueError, match="don't tile"):
        small(img_size=size)


def test_fixed_size_on_request():
    with pytest.raises(ValueError, match="got 40 x 40 pixels, wanted 32 x 32"):
        small(dynamic_img_size=False)(torch.rand(1, 3, 40, 40))


def test_unknown_pooling_and_route():
    with pytest.raises(ValueError, match="global_pool: got 'max'"):
        small(global_pool="max")
    with pytest.raises(ValueError, match="did you mean 'columns'"):
        small(routes=("raster", "colums"))


def test_weights_made_ready_at_once_are_the_same(monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", img_size=64, depth=3, embed_dim=48, num_classes=5).eval()
    image = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        wanted = model(image)
        monkeypatch.setattr(Vim, "infers", lambda self, hidden: True)
        torch.testing.assert_close(model(image), wanted, rtol=1e-5, atol=1e-6)
