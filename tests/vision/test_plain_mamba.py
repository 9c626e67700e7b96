"""PlainMamba: published numbers and names, the snakes' directions, sizes and checkpoints."""

import pytest
import timm
import torch
from cases import golden_inputs, golden_state_dict, load_golden
from fill import check, fill_input

import vision  # noqa: F401  registers the models
from vision.models.plain_mamba import PlainMamba, checkpoint_filter_fn
from vision.models.snake_mixer import snake_tables

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "d_state": 4, "num_classes": 5, "conv_size": 3}


def small(**kwargs) -> PlainMamba:
    torch.manual_seed(0)
    return PlainMamba(**{**SMALL, **kwargs}).eval()


def official(name: str) -> str:
    """The published name of a parameter of ours."""
    if name.startswith("head."):
        return name.replace("head.", "head.fc.")
    return "backbone." + name.replace(".mixer.", ".mamba.").replace("norm_f.", "ln1.")


def test_golden_logits_features_and_gradients():
    golden = load_golden("plainmamba_a")
    config = golden["config"]
    state = config["layer_cfgs"]["mamba_cfg"]["d_state"]
    model = timm.create_model(
        "plain_mamba_l1", img_size=config["img_size"], patch_size=config["patch_size"], num_classes=10,
        embed_dim=config["embed_dims"], depth=config["num_layers"], d_state=state,
    )  # fmt: skip
    assert {official(name): list(p.shape) for name, p in model.state_dict().items()} == golden["params"]
    model.load_state_dict(checkpoint_filter_fn({"state_dict": golden_state_dict(golden)}, model))
    model.eval()
    seen = {}
    model.patch_embed.register_forward_hook(lambda _, __, out: seen.update(patch_embed=out.flatten(1, 2)))
    model.layers[0].mixer.register_forward_hook(lambda _, __, out: seen.update({"layers.0.mamba": out}))
    for i in (0, 2):
        model.layers[i].register_forward_hook(lambda _, __, out, i=i: seen.update({f"layers.{i}": out[0] + out[1]}))
    model.norm_f.register_forward_hook(lambda _, __, out: seen.update(norm=out[0]))
    x = golden_inputs(golden)["x"].requires_grad_()
    y = model(x)
    check(y, golden["outputs"]["y"])
    assert seen.keys() == golden["outputs"]["features"].keys()
    for name, summary in golden["outputs"]["features"].items():
        check(seen[name], summary)
    (y * fill_input("loss_weight", y.shape)).sum().backward()
    grads = {official(name): p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    for name, summary in golden["grads"].items():
        check(grads[name], summary)


@pytest.mark.parametrize(("name", "millions"), [("l1", 7.552), ("l2", 26.146), ("l3", 50.956)])
def test_published_sizes(name, millions):
    model = timm.create_model(f"plain_mamba_{name}", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert model.default_cfg["hf_hub_id"] == "ChenhongyiYang/PlainMamba"


def test_snakes_name_the_step_into_each_token():
    tokens, steps = snake_tables(2, 3, torch.device("cpu"))
    assert tokens.tolist() == [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]
    assert steps.tolist() == [[0, 1, 1, 4, 2, 2], [0, 1, 1, 3, 2, 2], [0, 4, 1, 3, 1, 4], [0, 3, 2, 4, 2, 3]]


@pytest.mark.parametrize("size", [(32, 32), (20, 50), (7, 1)])
def test_any_size_runs(size):
    grid = tuple(-(-s // 8) for s in size)
    assert small().forward_features(torch.rand(1, 3, *size)).shape == (1, *grid, 32)


def test_official_checkpoint_loads_and_adapts(tmp_path):
    model = small()
    weights = {official(name): value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "meta": {"epoch": 300}, "optimizer": {}}, tmp_path / "l1.pth")
    overlay = {"file": str(tmp_path / "l1.pth"), "num_classes": 5}

    def load(**kwargs):
        return timm.create_model(
            "plain_mamba_l1", pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs}
        )

    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load().eval()(image), model(image), rtol=0, atol=0)
    other = load(img_size=(48, 32), num_classes=3, in_chans=1)
    assert other(torch.rand(2, 1, 48, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"unexpected: layers\.1"):
        load(depth=1)


def test_odd_patches_are_refused():
    with pytest.raises(ValueError, match="patch_size: got 7, wanted an even number"):
        small(patch_size=7)
