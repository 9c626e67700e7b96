"""Capturing a training step: which calls replay it, and that gradients reach the parameters; the graphs stand aside."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from core.errors import UserError
from core.language import TextModel
from core.lm import MambaConfig, MambaLM
from core.loss import linear_cross_entropy
from core.training.graphs import capture, check_graphs, release
from core.training.module import OptimizerOptions, ScheduleOptions


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
    release(nn.Sequential(net))
    net.train()(full)
    assert net.forward == plain
    assert replayed == [full.shape]


@pytest.mark.parametrize(
    ("steps", "shared", "message"),
    [(2, False, "accumulate_grad_batches 2, wanted 1"), (1, True, "weights are shared by processes"), (1, False, "")],
)
def test_what_cannot_be_a_graph(steps: int, shared: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = nn.Linear(2, 2)
    module.trainer = SimpleNamespace(accumulate_grad_batches=steps)
    if shared:
        monkeypatch.setattr("core.training.graphs.DTensor", nn.Parameter)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_graphs(module)


@pytest.mark.parametrize("options", [dict(compile=True), dict(gradient_checkpointing=True)])
def test_settings_that_exclude_graphs(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--model.graph and --model.{next(iter(options))} are both on"):
        TextModel(vocab_size=9, d_model=8, n_layer=1, graph=True, **options)


class Windows(LightningDataModule):
    """Four batches of random tokens, the last of them smaller."""

    def train_dataloader(self) -> DataLoader:
        tokens = torch.randint(9, (11, 33), generator=torch.Generator().manual_seed(0))
        return DataLoader(list(tokens), batch_size=3)  # pyright: ignore[reportArgumentType]


class Watch(Callback):
    """Notes behind each batch whether the backbone replays graphs: at a training's end they are freed."""

    def __init__(self) -> None:
        self.replays: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, TextModel)
        self.replays.append("forward" in vars(pl_module.net.backbone))


def trained(graph: bool, layer: str, **options: Any) -> tuple[TextModel, list[bool]]:
    """A trained model, and of each batch whether the backbone was graphs."""
    seed_everything(0)
    watch = Watch()
    options_of = {"Mamba1": {"d_state": 8}, "Mamba2": {"d_state": 16, "headdim": 16}}
    model = TextModel(
        vocab_size=9, d_model=16, n_layer=2, layer=layer, ssm_cfg=options_of[layer], graph=graph,
        optimizer=OptimizerOptions(lr=1e-2), schedule=ScheduleOptions(name="constant"),
    )  # fmt: skip
    trainer = Trainer(
        accelerator="gpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0, callbacks=[watch],
        **options,
    )  # fmt: skip
    trainer.fit(model, datamodule=Windows())
    return model, watch.replays


@pytest.mark.gpu
@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_a_training_by_graphs_is_a_plain_one(layer: str) -> None:
    (plain, never), (graphed, replays) = trained(False, layer), trained(True, layer)
    assert any(replays)
    assert not any(never)
    assert "forward" not in vars(graphed.net.backbone)
    for got, want in zip(graphed.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_a_training_that_cannot_be_graphs_is_refused_at_its_start() -> None:
    with pytest.raises(UserError, match="accumulate_grad_batches 2, wanted 1"):
        trained(True, "Mamba1", accumulate_grad_batches=2)


@pytest.mark.gpu
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
