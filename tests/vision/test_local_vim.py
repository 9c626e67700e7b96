"""LocalVim: published numbers and names, searched directions, rotary embeddings, sizes and checkpoints."""

import pytest
import timm
import torch
from cases import golden_inputs, golden_state_dict, load_golden
from fill import check, fill_input

import vision  # noqa: F401  registers the models
from vision.models.local_mixer import rotation_angles
from vision.models.local_vim import SEARCHED, LocalVim, checkpoint_filter_fn, directions

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "d_state": 4, "num_classes": 5,
         "routes": (directions("hV7&"), directions("H@v2"))}  # fmt: skip
TOKEN = {"class_token": True, "rotary": False}


def small(**kwargs) -> LocalVim:
    torch.manual_seed(0)
    return LocalVim(**{**SMALL, **kwargs}).eval()


def test_golden_logits_features_and_gradients():
    golden = load_golden("localmamba_a")
    config = golden["config"]
    letters = {"h": "h", "h_flip": "H", "v": "v", "v_flip": "V", "w2": "2", "w2_flip": "@", "w7": "7", "w7_flip": "&"}
    model = timm.create_model(
        "local_vim_tiny",
        d_state=config["ssm_cfg"]["d_state"],
        routes=[directions("".join(letters[name] for name in row)) for row in config["directions"]],
        **{key: config[key] for key in ("img_size", "patch_size", "depth", "embed_dim", "num_classes")},
    )
    assert {name: list(p.shape) for name, p in model.state_dict().items()} == golden["params"]
    for name, summary in golden["rope_tables"].items():
        check(getattr(model.rope, name), summary)
    model.load_state_dict(checkpoint_filter_fn({"state_dict": golden_state_dict(golden)}, model))
    model.eval()
    seen = {}
    for i in (0, config["depth"] - 1):
        model.layers[i].register_forward_hook(
            lambda _, __, out, i=i: seen.update({f"layers.{i}.hidden": out[0], f"layers.{i}.residual": out[1]})
        )
    x = golden_inputs(golden)["x"].requires_grad_()
    y = model(x)
    check(y, golden["outputs"]["y"])
    seen["tokens"] = model.forward_features(x).flatten(1, 2)
    assert seen.keys() == golden["outputs"]["features"].keys()
    for name, summary in golden["outputs"]["features"].items():
        check(seen[name], summary)
    (y * fill_input("loss_weight", y.shape)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    for name, summary in golden["grads"].items():
        check(grads[name], summary)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 7.994), ("tiny_middle_cls_token", 7.995), ("small", 27.784)])
def test_published_sizes(name, millions):
    model = timm.create_model(f"local_vim_{name}", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert model.layers[0].mixer.routes == "raster,columns_reversed,windows7,windows7_reversed"
    assert model.layers[19].mixer.routes == "columns,columns_reversed,windows2,windows2_reversed"
    assert len(SEARCHED.split()) == len(model.layers) == 20


@pytest.mark.parametrize("size", [(32, 32), (20, 50), (5, 9)])
@pytest.mark.parametrize("token", [{}, TOKEN])
def test_any_size_runs(size, token):
    height, width = (-(-s // 8) for s in size)
    model = small(**token)
    shape = (1, height * width + 1, 32) if token else (1, height, width, 32)
    assert model.forward_features(torch.rand(1, 3, *size)).shape == shape
    assert model.forward_intermediates(torch.rand(1, 3, *size), intermediates_only=True)[0].shape[2:] == (height, width)


def test_rotation_keeps_lengths_and_turns_with_the_place():
    model = small()
    x = torch.randn(1, 15, 32)
    residual = torch.randn(1, 15, 32)
    turned, _ = model.prepare(x, residual, [3, 5])
    pairs, pairs_turned = (t.unflatten(-1, (-1, 2)).norm(dim=-1) for t in (x, turned))
    torch.testing.assert_close(pairs, pairs_turned)
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1], x[:, 1])
    angles = rotation_angles(4, 4, 32, 14)
    torch.testing.assert_close(model.rope.freqs_cos, angles.cos().float())
    assert torch.equal(angles[::4, 0], torch.tensor([0.0, 3.5, 7.0, 10.5], dtype=torch.float64))  # rows in half one
    assert torch.equal(angles[:4, 16], torch.tensor([0.0, 3.5, 7.0, 10.5], dtype=torch.float64))  # columns in half two


def test_class_token_stands_in_the_middle():
    model = small(**TOKEN)
    tokens = model.forward_features(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(model.forward_head(tokens), model.head(tokens[:, 8]))
    model.reset_classifier(3, "avg")
    torch.testing.assert_close(model.forward_head(tokens), model.head((tokens.sum(1) - tokens[:, 8]) / 16))


@pytest.mark.parametrize("token", [{}, TOKEN])
def test_official_checkpoint_loads_and_adapts(tmp_path, token):
    model = small(**token)
    torch.save({"state_dict": model.state_dict(), "epoch": 300}, tmp_path / "local.ckpt")
    overlay = {"file": str(tmp_path / "local.ckpt"), "num_classes": 5}

    def load(**kwargs):
        args = {**SMALL, **token, **kwargs}
        return timm.create_model("local_vim_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **args)

    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load().eval()(image), model(image), rtol=0, atol=0)
    larger = load(img_size=(48, 32), num_classes=3)
    assert larger(torch.rand(1, 3, 48, 32)).shape == (1, 3)
    if not token:
        torch.testing.assert_close(larger.rope.freqs_sin, rotation_angles(6, 4, 32, 14).sin().float())
    with pytest.raises(ValueError, match=r"missing: layers\.2"):
        load(depth=3, routes=[directions("hHvV")] * 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 3}, "routes: got those of 2 blocks, wanted four names for each of 3"),
        ({"routes": (directions("hH"), directions("hHvV"))}, "routes: got 2 in a block"),
        ({"routes": (("raster", "column", "raster", "raster"),) * 2}, "did you mean 'columns'"),
        ({"class_token": True}, "rotary: got True with class_token=True"),
        ({"global_pool": "token"}, "global_pool: got 'token', wanted 'avg'"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)
