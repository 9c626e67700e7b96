"""VMamba: published numbers and sizes, file layouts, resolutions and refusals."""

import pytest
import timm
import torch
from cases import golden_inputs, golden_state_dict, load_golden
from fill import check, fill_input

import vision  # noqa: F401  registers the models
from vision.models.vmamba import CROSS, VMamba, checkpoint_filter_fn

MICRO = {"depths": (1, 1), "dims": 16, "num_classes": 5}
OURS = (("classifier.", ""), ("conv2d.1.", "conv2d."))  # published names and ours


def renamed(name: str) -> str:
    for old, new in OURS:
        name = name.replace(old, new)
    return name


def micro(**kwargs) -> VMamba:
    torch.manual_seed(0)
    return VMamba(**{**MICRO, **kwargs}).eval()


def build(config: dict) -> torch.nn.Module:
    """The model of a golden file's configuration."""
    name = "vmamba_tiny_m2" if config["forward_type"] == "m0_noz" else "vmamba_tiny_s1l8"
    return timm.create_model(
        name, num_classes=config["num_classes"], depths=config["depths"], dims=config["dims"],
        d_state=config["ssm_d_state"], expand=config["ssm_ratio"],
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", ["vmamba_a", "vmamba_m2_a"])
def test_golden_logits_features_and_gradients(name):
    golden = load_golden(name)
    model = build(golden["config"])
    model.load_state_dict(checkpoint_filter_fn({"model": golden_state_dict(golden)}, model))
    channels_first = golden["config"]["norm_layer"] == "ln2d"
    seen = {}

    def keep(feature):
        return lambda _, __, y: seen.update({feature: y.permute(0, 3, 1, 2) if channels_first else y})

    model.patch_embed.register_forward_hook(keep("patch_embed"))
    for i, layer in enumerate(model.layers):
        layer.downsample.register_forward_hook(keep(f"layers.{i}"))
        layer.blocks[0].op.register_forward_hook(keep(f"layers.{i}.blocks.0.op"))
    x = golden_inputs(golden)["x"].requires_grad_()
    y = model(x)
    check(y, golden["outputs"]["y"])
    for feature, summary in golden["outputs"]["features"].items():
        check(seen[feature], summary)
    (y * fill_input("loss_weight", y.shape)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()} | {"x": x.grad}
    for parameter, summary in golden["grads"].items():
        check(grads[renamed(parameter)], summary)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vmamba_tiny_v0", 22.893),
        ("vmamba_tiny_s1l8", 30.249),
        ("vmamba_tiny_s2l5", 30.706),
        ("vmamba_small_s2l15", 50.1),
        ("vmamba_small_s1l20", 49.013),
        ("vmamba_base_s1l20", 86.615),
        ("vmamba_base_s2l15", 88.6),
        ("vmamba_base_v0", 76.3),
    ],
)
def test_published_sizes(name, millions):
    model = timm.create_model(name, device="meta")
    digits = 3 if round(millions, 1) != millions else 1
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits) == millions
    assert "MzeroMiko" in model.default_cfg["url"]


@pytest.mark.parametrize("kwargs", [{}, {"mixer": "ssd", "d_state": 8}, {"gated": True, "d_state": 3, "stem": "patch"}])
def test_columns_are_rows_of_the_transposed_image(kwargs):
    rows = micro(routes=("raster", "raster_reversed"), **kwargs)
    columns = micro(routes=("columns", "columns_reversed"), **kwargs)
    weights = rows.state_dict()  # convolutions transposed; merging takes columns first
    for name, value in weights.items():
        if value.ndim == 4:
            weights[name] = value.transpose(2, 3)
        if "downsample.norm" in name or "downsample.reduction" in name:
            weights[name] = value.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)
    columns.load_state_dict(weights)
    image = torch.rand(2, 3, 40, 24)
    torch.testing.assert_close(columns(image.transpose(2, 3)), rows(image), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rows(image.transpose(2, 3)), rows(image), rtol=1e-2)


def test_bfloat16_is_as_good_as_its_precision():
    model, image = micro(), torch.rand(4, 3, 32, 48)
    truth = model(image)
    low = model.bfloat16()(image.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - truth).abs().max() < 0.05 * truth.abs().max()


def kept_bytes(model: torch.nn.Module, count: int) -> int:
    """Bytes that a forward on so many images keeps for the backward, casts of weights included."""
    storages = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t  # held, so that no other tensor takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(count, 3, 224, 224))
    return sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.mark.slow
def test_training_keeps_little():
    """49.4 MiB an image, 6.2 GiB at batch 128; with a perceptron of PyTorch's operators it would be 73.7."""
    model = timm.create_model("vmamba_tiny_s1l8").train()
    mebibytes = (kept_bytes(model, 2) - kept_bytes(model, 1)) / 2**20
    assert mebibytes < 52


# Checkpoints.


def published(model: VMamba, layout: str) -> dict[str, torch.Tensor]:
    """A model's weights in a published layout."""
    state = {}
    for name, value in model.state_dict().items():
        if layout == "early":
            for ours, theirs in (
                ("patch_embed.0", "patch_embed.proj"), ("patch_embed.2", "patch_embed.norm"),
                ("op.", "self_attention."), ("blocks.0.norm.", "blocks.0.ln_1."),
            ):  # fmt: skip
                name = name.replace(ours, theirs)
        elif name.startswith(("norm.", "head.")):
            name = f"classifier.{name}"
        if layout == "single file":
            name = name.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight")
            if ".x_proj." in name or ".dt_projs." in name:
                value = value.flatten(0, 1)
        if layout == "channels first" and value.ndim == 2 and ("proj" in name or "mlp" in name):
            value = value[:, :, None, None]
        if layout == "merging by number":
            name = name.replace("downsample.norm", "downsample.1").replace("downsample.reduction", "downsample.2")
        state[name] = value
    return state


def load(file, **kwargs) -> torch.nn.Module:
    overlay = {"file": str(file), "num_classes": 5}
    args = {**MICRO, **kwargs}
    return timm.create_model("vmamba_tiny_s1l8", pretrained=True, pretrained_cfg_overlay=overlay, **args).eval()


@pytest.mark.parametrize("key", ["model", "model_ema", "state_dict"])
@pytest.mark.parametrize("layout", ["published", "early", "single file", "channels first", "merging by number"])
def test_every_published_layout_loads(tmp_path, layout, key):
    kwargs = {"stem": "patch", "gated": True} if layout in ("early", "merging by number") else {}
    model = micro(**kwargs)
    torch.save({key: published(model, layout), "epoch": 1}, tmp_path / "vssm.pth")
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(load(tmp_path / "vssm.pth", **kwargs)(image), model(image), rtol=0, atol=0)


def test_a_file_with_a_yacs_configuration_loads(yacs, tmp_path):
    model = micro()
    with yacs() as node:
        torch.save({"model": published(model, "published"), "config": node({"MODEL": "vssm"})}, tmp_path / "vssm.pth")
    image = torch.rand(1, 3, 32, 32)
    loaded = load(tmp_path / "vssm.pth", num_classes=3)
    torch.testing.assert_close(loaded.forward_features(image), model.forward_features(image), rtol=0, atol=0)
    assert loaded(image).shape == (1, 3)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save({"model": micro(d_state=2).state_dict()}, tmp_path / "vssm.pth")
    with pytest.raises(ValueError, match=r"of another shape: layers.0.blocks.0.op.x_proj_weight"):
        load(tmp_path / "vssm.pth")


# Refusals.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixer": "s4"}, "mixer: got 's4'"),
        ({"stem": "conv7"}, "stem: got 'conv7'"),
        ({"routes": ("raster", "colums")}, "did you mean 'columns'"),
        ({"mixer": "ssd", "dims": 40}, "multiples of 16"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        micro(**kwargs)


def test_the_stem_for_small_images_keeps_their_size():
    model = VMamba(stem="small", depths=(1, 1), dims=16, num_classes=3)
    assert [level["reduction"] for level in model.feature_info] == [1, 2]
    _, maps = model.forward_intermediates(torch.randn(1, 3, 9, 12))
    assert [m.shape for m in maps] == [(1, 16, 9, 12), (1, 32, 5, 6)]


def test_routes_are_cross_scan():
    assert micro().layers[0].blocks[0].op.routes == ",".join(CROSS)
