"""What timm expects of hierarchical backbones alone, on each family's micro models (see also test_timm_contract)."""

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torchvision.models.feature_extraction import create_feature_extractor

import vision  # noqa: F401  registers the models
from vision.models.staged import StagedBackbone

MODELS = timm.list_models("test_*", module=["efficient_vmamba", "local_vmamba", "vmamba"])
SIZE = 64
FAMILIES = ("test_vmamba", "test_local_vmamba", "test_efficient_vmamba")
every_model = pytest.mark.parametrize("name", MODELS)
# Tracing takes seconds: one model of a family on each run, its flavours with the slow tests.
every_family = pytest.mark.parametrize(
    "name", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)


def create(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 7, **kwargs}).eval()


def image(count: int = 1, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@every_model
def test_features_head_and_reset(name):
    model = create(name)
    features = model.forward_features(image(2))
    assert features.shape == (2, 2, 2, model.num_features)
    torch.testing.assert_close(model.forward_head(features), model(image(2)))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((1, 2)))
    model.reset_classifier(0)
    torch.testing.assert_close(model(image(2)), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(image(2)), features)
    model.reset_classifier(4, "avg")
    assert model(image(2)).shape == (2, 4)
    assert model.get_classifier().out_features == 4
    with pytest.raises(ValueError, match="global_pool: got 'max'"):
        model.reset_classifier(4, "max")


@every_model
def test_initialises_again_after_to_empty(name):
    model = create(name, device="meta").to_empty(device="cpu")
    for t in (*model.parameters(), *model.buffers()):
        t.data.fill_(float("nan") if t.is_floating_point() else 1)
    wanted = create(name)
    for either in (model, wanted):
        torch.manual_seed(1)
        either.init_weights()
    torch.testing.assert_close(model.state_dict(), wanted.state_dict())


@every_model
def test_intermediates_and_pruning(name):
    model = create(name)
    last = len(model.feature_info) - 1
    final, taps = model.forward_intermediates(image())
    torch.testing.assert_close(final, model.forward_features(image()))
    assert [tap.shape[1] for tap in taps] == [info["num_chs"] for info in model.feature_info]
    assert [SIZE // tap.shape[2] for tap in taps] == [info["reduction"] for info in model.feature_info]
    rows = model.forward_intermediates(image(), norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(rows[0].permute(0, 3, 1, 2), taps[0])
    torch.testing.assert_close(rows[last], final)
    for i in range(last + 1):
        stopped = model.forward_intermediates(image(), [i], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(stopped[0], taps[i])
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([i], prune_norm=True)
        torch.testing.assert_close(pruned.forward_features(image()).permute(0, 3, 1, 2), taps[i])
        pruned.train().forward_features(image(2)).square().sum().backward()
        assert not [n for n, p in pruned.named_parameters() if p.grad is None]
    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers([last], prune_head=False)
    torch.testing.assert_close(whole(image()), model(image()))


@every_model
@pytest.mark.parametrize("size", [(48, 96), (39, 53)])
def test_features_only_at_any_size(name, size):
    model = create(name, features_only=True, out_indices=(0, 2))
    maps = model(image(1, *size))
    info = model.feature_info
    for found, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert found.shape[1] == channels
        assert all(abs(n - side / reduction) < 1 for n, side in zip(found.shape[2:], size, strict=True))
        assert found.isfinite().all()


@every_model
def test_drop_path_leaves_branches_out(name):
    model = create(name, drop_path_rate=0.6).train()
    with torch.no_grad():
        ys = model(image().expand(8, -1, -1, -1))
    assert len(ys.round(decimals=4).unique(dim=0)) > 1


@every_family
def test_fx_traces_forward_and_backward(name):
    model = create(name)
    leaves = {
        "autowrap_functions": list(timm.models.get_notrace_functions()),
        "leaf_modules": timm.models.get_notrace_modules(),
    }
    traced = create_feature_extractor(model, ["head"], tracer_kwargs=leaves)
    for x in (image(), image(1, 40, 72)):
        torch.testing.assert_close(traced(x)["head"], model(x))
    traced(image())["head"].sum().backward()
    assert not [n for n, p in traced.named_parameters() if p.grad is None]


@every_family
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_also_from_a_file(name, tmp_path):
    model = create(name)
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    for x in (image(), image(1, 40, 72)):
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize(
    "name", [name if name == "test_vmamba" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_compiles_whole(name):
    model = create(name)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(image(2))
    torch.testing.assert_close(y, model(image(2)))
    y.sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@every_model
def test_weight_decay_and_layer_groups(name):
    model = create(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    free = ("A_logs", "Ds", "dt_projs_bias")
    for n, p in model.named_parameters():
        assert (id(p) in decayed) != (p.ndim == 1 or n.endswith(free)), n
    assert any(n.endswith("A_logs") for n in model.no_weight_decay())
    scales = {group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)}
    assert len(scales) > len(model.layers)
    assert isinstance(model, StagedBackbone)
