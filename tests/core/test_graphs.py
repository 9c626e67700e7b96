"""Capturing a training step: which calls replay it, and that gradients reach the parameters; the graphs stand aside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.lm import MambaConfig, MambaLM
from core.loss import linear_cross_entropy
from core.training.graphs import capture


def test_training_batches_of_one_shape_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    plain: Any = net.forward
    replayed: list[torch.Size] = []

    def graphs(call: Callable[..., Any], given: tuple[Tensor, ...]) -> Callable[..., Any]:
        def replay(*tensors: Tensor) -> Any:
            assert [t.data_ptr() for t in tensors[1:]] == [t.data_ptr() for t in given[1:]]  # nothing is copied
            replayed.append(tensors[0].shape)
            graphed, net.forward = net.forward, plain  # as at the capture
            out = call(*tensors)
            net.forward = graphed
            return out

        return replay

    def gradients(x: Tensor) -> list[Tensor | None]:
        net.zero_grad()
        net(x).square().sum().backward()
        return [p.grad for p in net.parameters()]

    full, short = torch.randn(5, 3), torch.randn(2, 3)
    want = [gradients(full), gradients(short)]
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphs)
    capture(net, full)
    torch.testing.assert_close([gradients(full), gradients(short)], want)
    assert replayed == [full.shape]
    with torch.no_grad():
        net(full)
    net.eval()(full)
    assert replayed == [full.shape]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
@pytest.mark.parametrize("ssm_cfg", [dict(layer="Mamba1", d_state=8), dict(layer="Mamba2", d_state=16, headdim=16)])
def test_a_language_model_by_graphs(ssm_cfg: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=32, n_layer=2, vocab_size=50, ssm_cfg=ssm_cfg), device="cuda")
    backbone: Any = model.backbone

    def gradients(ids: Tensor) -> list[Tensor | None]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = linear_cross_entropy(backbone(ids)[:, :-1], model.lm_head.weight, ids[:, 1:])
        loss.backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    first, second = torch.randint(50, (2, 3, 70), device="cuda")
    want = [gradients(first), gradients(second)]
    with torch.autocast("cuda", torch.bfloat16):
        capture(backbone, first)
    assert "forward" in vars(backbone)
    for _ in range(2):
        torch.testing.assert_close([gradients(first), gradients(second)], want, rtol=1e-2, atol=1e-5)
