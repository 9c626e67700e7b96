"""HyenaDNA and Caduceus: recorded values of the published models, their names, and equivariance."""

import pytest
import torch
from cases import golden_cases, golden_inputs, golden_state_dict
from fill import check, fill_input, fill_param

from genomics import caduceus, hyenadna_published
from genomics.caduceus import Caduceus, CaduceusConfig
from genomics.hyenadna import HyenaDNA, HyenaDNAConfig
from genomics.vocabulary import COMPLEMENT

CADUCEUS = [(name, case) for name in ("caduceus_ph_a", "caduceus_ps_a") for case in golden_cases(name)]


def test_golden_hyenadna() -> None:
    case = golden_cases("hyenadna_a")["main"]
    model = HyenaDNA(hyenadna_published.config_from_published(case["config"])).eval()
    own = {name: list(t.shape) for name, t in model.state_dict().items() if name != "lm_head.weight"}
    assert own == case["params"]
    state = golden_state_dict(case, model)
    model.load_state_dict(hyenadna_published.rename_published({f"model.{k}": v for k, v in state.items()}))
    first = model.backbone.layers[0].mixer
    check(first.filter_fn.pos_emb.z, case["outputs"]["pos_emb_z"])
    check(first.filter_fn.pos_emb.t, case["outputs"]["pos_emb_t"])
    check(first.filter_fn.modulation.deltas, case["outputs"]["deltas"])
    check(first.filter_fn.filter(64), case["outputs"]["filter_layer_0"])
    ids = golden_inputs(case)["input_ids"]
    y = model.backbone(ids)
    check(y, case["outputs"]["y"])
    check(model(ids), case["outputs"]["logits"])
    loss = (y * fill_input("loss_weight", y.shape)).sum()
    assert loss.item() == pytest.approx(case["loss_value"], rel=1e-4)
    loss.backward()
    gradients = dict(model.named_parameters(remove_duplicate=False))
    for name, want in case["grads"].items():
        check(gradients[name].grad, want)


@pytest.mark.parametrize(("file", "name"), CADUCEUS)
def test_golden_caduceus(file: str, name: str) -> None:
    case = golden_cases(file)[name]
    config = caduceus.config_from_published(case["config"])
    model = Caduceus(config).eval()
    published = caduceus.published_names(model.state_dict(), config)
    assert {k: list(t.shape) for k, t in published.items()} == case["params"]
    model.load_state_dict(caduceus.rename_published(golden_state_dict(case, _Holder(published))))
    ids = golden_inputs(case)["input_ids"]
    y = model(ids)
    check(model.hidden(ids), case["outputs"]["hidden"])
    check(y, case["outputs"]["y"])
    loss = (y * fill_input("loss_weight", y.shape)).sum()
    assert loss.item() == pytest.approx(case["loss_value"], rel=1e-4)
    loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters(remove_duplicate=False)}
    grads = caduceus.published_names({k: g for k, g in grads.items() if g is not None}, config)
    for key, want in case["grads"].items():
        check(grads[key], want)


class _Holder(torch.nn.Module):
    """Gives ``golden_state_dict`` the entries that a file says to keep."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return self.state


def small(rcps: bool, **options) -> Caduceus:
    torch.manual_seed(0)
    config = CaduceusConfig(d_model=8, n_layer=3, rcps=rcps, ssm_cfg={"d_state": 4}, **options)
    model = Caduceus(config).eval()
    return model.double()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("length", [1, 7, 32])
def test_equivariance_is_exact(fused: bool, length: int) -> None:
    model = small(True, fused_add_norm=fused)
    ids = torch.randint(0, 12, (2, length), generator=torch.Generator().manual_seed(1))
    complement = torch.from_numpy(COMPLEMENT).long()
    there, back = model(ids), model(complement[ids].flip(1))
    order = torch.cat([complement, torch.arange(12, 16)])
    # Sums of two strands' logits in one order or the other: the same to the last bit.
    assert torch.equal(back, there.flip(1)[..., order])
    plain = small(False)
    assert not torch.allclose(plain(complement[ids].flip(1)), plain(ids).flip(1)[..., order])


def test_fused_weights_are_another_function() -> None:
    ids = torch.randint(7, 11, (1, 16))
    fused, plain = small(True, fused_add_norm=True), small(True, fused_add_norm=False)
    plain.load_state_dict(fused.state_dict())
    assert not torch.allclose(fused(ids), plain(ids), atol=1e-3)


def test_packed_rows_are_what_they_are_alone() -> None:
    model = small(True)
    ids = torch.randint(7, 11, (1, 12))
    seq_idx = torch.tensor([[0] * 5 + [1] * 7])
    y = model(ids, seq_idx=seq_idx)
    torch.testing.assert_close(y[:, :5], model(ids[:, :5]))
    torch.testing.assert_close(y[:, 5:], model(ids[:, 5:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_layer_idx": [1]}, "attn_layer_idx: got"),
        ({"max_position_embeddings": 5}, "max_position_embeddings: got 5"),
        ({"process_group": object()}, "process_group: got"),
        ({"layer": {}}, "no l_max"),
        ({"layer": {"l_max": 8, "num_heads": 2}}, "num_heads: got 2, wanted 1"),
        ({"layer": {"l_max": 8, "filter_ordr": 2}}, "did you mean 'filter_order'"),
        ({"layer": {"l_max": 8, "emb_dim": 4}}, "emb_dim: got 4"),
        ({"layer": {"l_max": 8, "_name_": "mha"}}, "_name_"),
    ],
)
def test_hyenadna_refuses_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyenaDNA(HyenaDNAConfig(**{"d_model": 4, "n_layer": 1, "layer": {"l_max": 8}, **options}))


def test_checkpointing_changes_no_name_and_no_gradient() -> None:
    grads = []
    for options in ({}, {"checkpoint_mixer": True, "checkpoint_mlp": True}):
        torch.manual_seed(0)
        model = HyenaDNA(HyenaDNAConfig(d_model=4, n_layer=2, embed_dropout=0, layer={"l_max": 9}, **options)).double()
        model(torch.arange(9)[None]).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert list(grads[0]) == list(grads[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_released_names_are_translated() -> None:
    model = HyenaDNA(HyenaDNAConfig(d_model=4, n_layer=1, layer={"l_max": 8, "lr_pos_emb": 0.0}))
    state = {name: fill_param(name, tensor.shape) for name, tensor in model.state_dict().items()}
    renamed = {
        "model." + name.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): tensor
        for name, tensor in state.items()
        if name != "lm_head.weight"
    }
    renamed |= {"torchmetrics.val": torch.zeros(1), "decoder.0.weight": torch.zeros(1)}
    found = hyenadna_published.rename_published(renamed)
    assert set(found) == set(state)
