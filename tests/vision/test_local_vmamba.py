"""LocalVMamba: published numbers and sizes, file layout, routes and refusals."""

import pytest
import timm
import torch
from cases import golden_inputs, golden_state_dict, load_golden
from fill import check, fill_input

import vision  # noqa: F401  registers the models
from vision.models.local_vmamba import SMALL, TINY, LocalVMamba, checkpoint_filter_fn, searched

ROUTES = {"h": "raster", "v": "columns", "w2": "windows2", "w7": "windows7"}  # published names and ours


def ours(direction: str) -> str:
    name = ROUTES[direction.removesuffix("_flip")]
    return name + "_reversed" if direction.endswith("_flip") else name


def test_golden_logits_features_and_gradients():
    golden = load_golden("localvmamba_a")
    config = golden["config"]
    model = timm.create_model(
        "local_vmamba_tiny", num_classes=config["num_classes"], depths=config["depths"], dims=config["dims"],
        d_state=config["ssm_d_state"], expand=config["ssm_ratio"],
        routes=[[ours(name) for name in block] for block in config["directions"]],
    ).eval()  # fmt: skip
    model.load_state_dict(checkpoint_filter_fn({"state_dict": golden_state_dict(golden)}, model))
    seen = {}
    for i, layer in enumerate(model.layers):
        layer.downsample.register_forward_hook(lambda _, __, y, i=i: seen.update({f"layers.{i}": y}))
        layer.blocks[0].op.register_forward_hook(lambda _, __, y, i=i: seen.update({f"layers.{i}.blocks.0.op": y}))
    x = golden_inputs(golden)["x"].requires_grad_()
    y = model(x)
    check(y, golden["outputs"]["y"])
    for feature, summary in golden["outputs"]["features"].items():
        check(seen[feature], summary)
    (y * fill_input("loss_weight", y.shape)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()} | {"x": x.grad}
    for parameter, summary in golden["grads"].items():
        check(grads[parameter.replace("multi_scan.attn", "attn")], summary)


@pytest.mark.parametrize(("name", "millions"), [("local_vmamba_tiny", 25.527), ("local_vmamba_small", 49.749)])
def test_published_sizes(name, millions):
    model = timm.create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_searched_routes():
    assert [len(searched(table)) for table in (TINY, SMALL)] == [15, 33]
    assert searched(TINY)[0] == ("raster", "raster_reversed", "windows7", "windows7_reversed")
    assert searched(SMALL)[2] == ("raster_reversed", "columns", "columns_reversed", "windows7")
    model = timm.create_model("local_vmamba_tiny", device="meta")
    blocks = [block.op.routes for layer in model.layers for block in layer.blocks]
    assert blocks == [",".join(names) for names in searched(TINY)]


@pytest.mark.parametrize("size", [(40, 72), (36, 28)])  # maps that windows of 7 and of 2 don't tile
def test_windows_need_not_tile_the_map(size):
    model = timm.create_model("test_local_vmamba", num_classes=3).eval()
    x = torch.rand(1, 3, *size)
    y = model(x)
    assert y.isfinite().all()
    with torch.no_grad():
        assert not torch.allclose(model(x.flip(3)), y)


def test_published_file_loads(tmp_path):
    model = timm.create_model("test_local_vmamba", num_classes=5).eval()
    state = {
        (f"classifier.{n}" if n.startswith(("norm.", "head.")) else n.replace(".attn.", ".multi_scan.attn.")): t
        for n, t in model.state_dict().items()
    }
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "local.ckpt")
    overlay = {"file": str(tmp_path / "local.ckpt"), "num_classes": 5}
    loaded = timm.create_model("test_local_vmamba", num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(x), model(x), rtol=0, atol=0)


def test_routes_of_another_depth_are_refused():
    with pytest.raises(ValueError, match="got those of 15 blocks, wanted 3"):
        LocalVMamba(depths=(1, 2))
