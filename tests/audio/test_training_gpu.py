"""Training on a GPU as CUDA graphs: the numbers of plain steps, also where batches are not full."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from torch import Tensor

from audio.datasets import AudioData
from audio.module import SoundModel
from audio.net import SoundNet
from audio.sashimi import SashimiConfig
from core.errors import UserError
from core.training.graphs import capture
from core.training.module import OptimizerOptions, ScheduleOptions

pytestmark = pytest.mark.gpu

NETS = {
    "mamba": SashimiConfig(16, 1, (4, 4), mixer_cfg={"d_state": 4}),
    "complex": SashimiConfig(16, 1, (4, 4), mixer="mamba_complex", mixer_cfg={"d_state": 4}),
    "s4d": SashimiConfig(16, 1, (4, 4), mixer="s4d", mixer_cfg={"n_ssm": 1}, mlp=2),
    "s4": SashimiConfig(16, 1, (4, 4), mixer="s4", mixer_cfg={"n_ssm": 1}, mlp=2),
    "mamba_s4": SashimiConfig(16, 1, (4, 4), mixer="mamba_s4"),
}


def gradients(net: SoundNet, levels: Tensor, autocast: bool) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        logits = net(levels[:, :-1])
    F.cross_entropy(logits.flatten(0, 1).float(), levels[:, 1:].flatten()).backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_graphs_have_the_gradients_of_plain_steps(name: str, autocast: bool) -> None:
    torch.manual_seed(0)
    net = SoundNet(NETS[name], 256).cuda()
    batches = [torch.randint(0, 256, shape, device="cuda") for shape in ((3, 1025), (3, 1025), (2, 1025), (3, 500))]
    want = [gradients(net, batch, autocast) for batch in batches]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        capture(net, torch.zeros_like(batches[0][:, :-1]))
    for batch, plain in zip(batches, want, strict=True):
        got = gradients(net, batch, autocast)
        assert len(got) == len(plain)
        for g, w in zip(got, plain, strict=True):
            assert float((g - w).norm()) <= (2e-2 if autocast else 1e-4) * float(w.norm())


@pytest.mark.parametrize("name", NETS)
def test_a_gpu_has_the_gradients_of_a_cpu(name: str) -> None:
    torch.manual_seed(0)
    net = SoundNet(NETS[name], 256)
    levels = torch.randint(0, 256, (2, 301))
    F.cross_entropy(net(levels[:, :-1]).flatten(0, 1), levels[:, 1:].flatten()).backward()
    want = [p.grad for p in net.parameters() if p.grad is not None]
    for got, plain in zip(gradients(net.cuda(), levels.cuda(), False), want, strict=True):
        assert float((got - plain.cuda()).norm()) <= 1e-3 * float(plain.norm())


def trained(graph: bool, **options: Any) -> tuple[SoundModel, float]:
    """A net after three epochs whose last batches are not full, and its loss in nats."""
    seed_everything(0)
    schedule = ScheduleOptions(name="constant")
    model = SoundModel(NETS["mamba"], optimizer=OptimizerOptions(lr=3e-3), schedule=schedule, graph=graph)
    data = AudioData(sample_rate=8000, window=4096, batch_size=12, pad="window")
    trainer = Trainer(
        accelerator="gpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert len(data.parts["train"]) % 12
    return model, float(trainer.callback_metrics["val/loss"])


def test_a_training_by_graphs_learns_as_a_plain_one() -> None:
    (plain, want), (graphed, got) = trained(False), trained(True)
    assert "forward" in vars(graphed.net)
    assert "forward" not in vars(plain.net)
    assert got == pytest.approx(want, rel=2e-3)
    assert want < 5.4  # ln 256 is 5.5: something was learnt


def test_gradients_are_not_accumulated() -> None:
    with pytest.raises(UserError, match="accumulate_grad_batches 2, wanted 1"):
        trained(True, accumulate_grad_batches=2)
