"""What timm expects of a backbone, checked on the micro models; what only hierarchical ones have is in test_staged.

``timm_suite.py`` runs timm's own tests. Each test runs for every registered ``test_*`` model of this project.
"""

import copy

import pytest
import timm
import torch
from accuracy import relative_rms
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torchvision.models.feature_extraction import create_feature_extractor

import vision  # noqa: F401  registers the models

PLAIN = timm.list_models("test_*", module=["local_vim", "mamba_nd", "plain_mamba", "vim"])
MODELS = PLAIN + timm.list_models("test_*", module=["efficient_vmamba", "local_vmamba", "vmamba"])
# What takes seconds a model: some, the others in `make test-all`.
QUICK = ("test_local_vim_cls", "test_vim", "test_vmamba", "test_local_vmamba", "test_efficient_vmamba")


def models(names: list[str], quick: tuple[str, ...] = QUICK) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]
    )


every_model = pytest.mark.parametrize("name", MODELS)
every_plain_model = pytest.mark.parametrize("name", PLAIN)
some_models, some_plain_models = models(MODELS), models(PLAIN)
SIZE = 64


def create(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 7, **kwargs}).eval()


def image(count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def assert_same_distribution(name: str, drawn: torch.Tensor, again: torch.Tensor) -> None:
    """Holds mean and standard deviation of two samples to 6 standard errors of their difference.

    The variance of a mean is var / n, that of a standard deviation about (fourth moment - var^2) / (4 n var).
    A constant must be met exactly.
    """
    if drawn.std() == 0 or drawn.numel() == 1:
        assert torch.equal(drawn, again), name
        return
    moments = [(t.mean(), t.var(), (t - t.mean()).pow(4).mean()) for t in (drawn, again)]
    means, deviations = [m for m, _, _ in moments], [v.sqrt() for _, v, _ in moments]
    of_mean = sum(v for _, v, _ in moments) / drawn.numel()
    of_deviation = sum((m4 - v**2) / (4 * v) for _, v, m4 in moments) / drawn.numel()
    for (a, b), variance in ((means, of_mean), (deviations, of_deviation)):
        assert abs(a - b) <= 6 * variance.sqrt(), f"{name}: {a:.4g} and {b:.4g}"


@every_model
def test_backward_reaches_every_parameter(name):
    model = create(name, drop_path_rate=0.0).train()
    model(image(2)).mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not [n for n, p in model.named_parameters() if not p.grad.any()]


@every_model
def test_unknown_arguments_raise(name):
    with pytest.raises(TypeError, match="not_an_argument"):
        create(name, not_an_argument=1)


@every_plain_model
def test_features_head_and_reset(name):
    model = create(name)
    features = model.forward_features(image(2))
    assert features.shape[model.feature_dim] == model.num_features
    torch.testing.assert_close(model.forward_head(features), model(image(2)))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image(2)), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(image(2)), features)
    model.reset_classifier(4, "avg")
    assert model(image(2)).shape == (2, 4)
    assert model.get_classifier().out_features == 4


@every_model
def test_meta_device_and_dtype(name):
    model = create(name, device="meta", dtype=torch.bfloat16)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model(torch.empty(1, 3, SIZE, SIZE, device="meta", dtype=torch.bfloat16)).dtype == torch.bfloat16


@every_plain_model
def test_initialises_again_after_to_empty(name):
    model = create(name, device="meta").to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    assert model(image()).isfinite().all()
    wanted = dict(create(name).named_parameters())
    for n, p in model.named_parameters():
        assert_same_distribution(n, p.detach().double(), wanted[n].detach().double())


@some_plain_models
def test_intermediates_and_pruning(name):
    model = create(name)
    last = len(model.feature_info) - 1
    final, taps = model.forward_intermediates(image())
    torch.testing.assert_close(final, model.forward_features(image()))
    assert [tap.shape[1] for tap in taps] == [info["num_chs"] for info in model.feature_info]
    flat = model.forward_intermediates(image(), output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(flat[0], taps[0].flatten(2).transpose(1, 2))
    normed = model.forward_intermediates(image(), [last], norm=True, output_fmt="NLC", intermediates_only=True)[0]
    patches = final.flatten(1, -2)
    if hasattr(model, "cls_token"):
        middle = flat[0].shape[1] // 2
        patches = torch.cat((final[:, :middle], final[:, middle + 1 :]), 1)
    torch.testing.assert_close(normed, patches)
    for i in range(last + 1):
        stopped = model.forward_intermediates(image(), [i], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(stopped[0], taps[i])
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([i], prune_norm=True)
        torch.testing.assert_close(pruned.forward_intermediates(image(), [i], intermediates_only=True)[0], taps[i])
        pruned.train().forward_features(image(2)).sum().backward()
        assert not [n for n, p in pruned.named_parameters() if p.grad is None]
    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers([last], prune_head=False)
    torch.testing.assert_close(whole(image()), model(image()))


@every_plain_model
def test_features_only(name):
    model = create(name, features_only=True, out_indices=(0, 2))
    maps = model(torch.rand(1, 3, 48, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, 48 // reduction, 96 // reduction)
        for channels, reduction in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]


@some_models
def test_gradient_checkpointing_changes_nothing(name):
    results = []
    for enable in (False, True):
        model = create(name)
        names = list(model.state_dict())
        model.set_grad_checkpointing(enable)
        assert list(model.state_dict()) == names
        y = model.train()(image(2))
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@every_plain_model
def test_fx_traces_forward_and_backward(name):
    model = create(name)
    functions = list(timm.models.get_notrace_functions())
    traced = create_feature_extractor(
        model,
        ["head"],
        tracer_kwargs={"autowrap_functions": functions, "leaf_modules": timm.models.get_notrace_modules()},
    )
    for size in (SIZE, 96):
        x = torch.rand(1, 3, size, size)
        torch.testing.assert_close(traced(x)["head"], model(x))
    traced(image())["head"].sum().backward()
    assert not [n for n, p in traced.named_parameters() if p.grad is None]


@every_plain_model
def test_plain_symbolic_trace(name):
    model = create(name)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(image()), model(image()))


@every_plain_model
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_also_from_a_file(name, tmp_path):
    model = create(name)
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    for size in (SIZE, 96):
        x = torch.rand(1, 3, size, size)
        torch.testing.assert_close(loaded(x), model(x))


@some_plain_models
def test_compiles_whole(name):
    model = create(name)
    keys = list(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(image(2))
    torch.testing.assert_close(y, model(image(2)))
    y.sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert list(model.state_dict()) == keys


@some_models
def test_exports(name):
    model = create(name)
    exported = torch.export.export(model, (image(),)).module()
    torch.testing.assert_close(exported(image()), model(image()))


@every_model
def test_autocast(name, monkeypatch):
    model = create(name)
    with torch.autocast("cpu", torch.bfloat16):
        model(image(2)).float().sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        features = model.forward_features(image(2))
        monkeypatch.setenv("TRISCAN_BACKEND", "reference")
        reference = model.forward_features(image(2))
    truth = model.double().forward_features(image(2).double())
    assert features.dtype == reference.dtype == torch.bfloat16
    assert relative_rms(features, truth) <= 2 * relative_rms(reference, truth)


@every_plain_model
def test_weight_decay_and_layer_groups(name):
    model = create(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for n, p in model.named_parameters():
        free = p.ndim == 1 or n in model.no_weight_decay()
        assert (id(p) in decayed) != free, n
    special = {n for n, _ in model.named_parameters() if n in ("pos_embed", "cls_token") or "A_" in n}
    assert special <= model.no_weight_decay()
    scales = {group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)}
    assert len(scales) == len(model.layers) + 2  # stem, one a block, and norm with head
