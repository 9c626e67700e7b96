"""EfficientVMamba: published numbers and sizes, file layout, odd sizes."""

import pytest
import timm
import torch
from cases import golden_inputs, golden_state_dict, load_golden
from fill import check, fill_input

import vision  # noqa: F401  registers the models
from vision.models.efficient_vmamba import INVERTED, AtrousSS2D, checkpoint_filter_fn, rename
from vision.models.ss2d import SS2D


def test_golden_logits_features_and_gradients():
    golden = load_golden("efficientvmamba_a")
    config = golden["config"]
    model = timm.create_model(
        "efficient_vmamba_tiny", num_classes=config["num_classes"], depths=config["depths"], dims=config["dims"]
    ).eval()
    model.load_state_dict(checkpoint_filter_fn({"state_dict": golden_state_dict(golden)}, model))
    seen = {}
    for i, layer in enumerate(model.layers):
        layer.downsample.register_forward_hook(lambda _, __, y, i=i: seen.update({f"layers.{i}": y}))
        if i < 2:
            hook = lambda _, __, y, i=i: seen.update({f"layers.{i}.blocks.0.op": y})  # noqa: E731
            layer.blocks[0].op.register_forward_hook(hook)
    x = golden_inputs(golden)["x"].requires_grad_()
    y = model(x)
    check(y, golden["outputs"]["y"])
    for feature, summary in golden["outputs"]["features"].items():
        check(seen[feature], summary)
    (y * fill_input("loss_weight", y.shape)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()} | {"x": x.grad}
    for parameter, summary in golden["grads"].items():
        check(grads[rename(parameter)], summary)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("efficient_vmamba_tiny", 6.494), ("efficient_vmamba_small", 11.274), ("efficient_vmamba_base", 33.717)],
)
def test_published_sizes(name, millions):
    model = timm.create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


@pytest.mark.parametrize("size", [(5, 4), (6, 7), (3, 3)])
def test_each_token_needs_its_own_route_alone(size):
    """``AtrousSS2D`` computes what ``SS2D`` does with time steps for all routes; padding included."""
    torch.manual_seed(0)
    names = [f"atrous{i}" for i in range(4)]
    atrous, plain = AtrousSS2D(16, names, 4, 2.0, True, True), SS2D(16, names, 4, 2.0, True, True)
    atrous.init_weights()
    plain.load_state_dict(atrous.state_dict())
    x = torch.randn(2, *size, 16)
    results = []
    for module in (atrous, plain):
        y = module(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_published_file_loads(tmp_path):
    model = timm.create_model("test_efficient_vmamba", num_classes=5).eval()
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith(("norm.", "head.")):
            name = f"classifier.{name}"
        if name.startswith("layers.2."):  # 2 blocks: a permutation, blocks 1 and 2, a permutation, the merging
            name = name.replace(".downsample.", ".4.").replace(".blocks.0.", ".1.").replace(".blocks.1.", ".2.")
        if name.startswith("layers.3."):
            name = name.replace(".blocks.0.", ".1.")
        for theirs, ours in INVERTED.items():
            if name.startswith(("layers.2", "layers.3")):
                name = name.replace(f".{ours}", f".{theirs}")
        state[f"module.module.{name}"] = value
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "efficient.ckpt")
    overlay = {"file": str(tmp_path / "efficient.ckpt"), "num_classes": 5}
    loaded = timm.create_model("test_efficient_vmamba", num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(x), model(x), rtol=0, atol=0)
    raw = torch.load(tmp_path / "efficient.ckpt", weights_only=True)
    assert checkpoint_filter_fn(raw, model).keys() == model.state_dict().keys()
