"""Training of language models on text by next-token prediction.

Legend: B batch, L tokens of a window.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric

from core.errors import UserError
from core.generate import generate
from core.lm import MambaConfig, MambaLM
from core.parallel.group import active, mean_share
from core.parallel.tensor import head_loss
from core.published import save_lm
from core.sampling import Sampling
from core.text import TextData
from core.tokens import TOKENIZER, ByteTokenizer, save_byte_tokenizer
from core.training.graphs import capture, check_graphs
from core.training.module import OptimizerOptions, ScheduleOptions, TrainingModule
from core.training.report import Report

PADDING = -1  # in a window: predicted nowhere


class TextModel(TrainingModule):
    """A Mamba language model of text (Gu & Dao 2023, section 4.2).

    Perplexity is per token; bits per byte are the loss of all tokens over the bytes that they spell, and compare models
    of different vocabularies. The trained model is left in ``model/`` of the run's folder, ready for core.generate.

    Args:
        vocab_size: Number of tokens; comes from the data.
        d_model: Width of the model.
        n_layer: Number of blocks.
        layer: The blocks' mixer: Mamba1, Mamba2 or Mamba3.
        ssm_cfg: Further arguments of the mixer.
        attn_layer_idx: Blocks that hold attention instead.
        attn_cfg: Arguments of attention.
        d_intermediate: Hidden width of a gated MLP in each block; 0 is without.
        gradient_checkpointing: Compute blocks again in the backward pass instead of keeping their activations.
        sample_tokens: Length of the sample text in the report.
        optimizer: The optimizer and its parameter groups.
        schedule: The learning rate over the run.
        compile: Compile the model.
        graph: Replay the backbone's forward and backward as CUDA graphs, which leaves out the host's time: more than
            the GPU's for models of up to a few hundred million parameters. Batches of another shape than the second's
            run as they do otherwise. Not with ``compile``, ``gradient_checkpointing``, accumulated gradients, or
            sequences or weights that processes share; without a GPU it has no effect.
    """

    headline = "test/bits_per_byte"
    item_name = "windows"
    cuts_sequences = True
    shares_layers = True

    def __init__(
        self,
        vocab_size: int = 257,
        d_model: int = 768,
        n_layer: int = 24,
        layer: str = "Mamba1",
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        d_intermediate: int = 0,
        gradient_checkpointing: bool = False,
        sample_tokens: int = 200,
        optimizer: OptimizerOptions = OptimizerOptions(),
        schedule: ScheduleOptions = ScheduleOptions(),
        compile: bool = False,
        graph: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile)
        if graph and compile:
            raise UserError("--model.graph and --model.compile are both on, wanted one of them")
        if graph and gradient_checkpointing:
            raise UserError("--model.graph and --model.gradient_checkpointing are both on, wanted one of them")
        self.graph_requested = graph
        config = MambaConfig(
            d_model=d_model, n_layer=n_layer, vocab_size=vocab_size, d_intermediate=d_intermediate,
            ssm_cfg={**(ssm_cfg or {}), "layer": layer}, attn_layer_idx=attn_layer_idx or [], attn_cfg=attn_cfg or {},
        )  # fmt: skip
        try:
            self.net = MambaLM(config)
        except (TypeError, ValueError) as error:
            raise UserError(f"--model: {error}") from error
        self.net.set_gradient_checkpointing(gradient_checkpointing)
        self.sample_tokens = sample_tokens
        self.losses = nn.ModuleDict({"val_": MeanMetric(), "test_": MeanMetric()})

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the tokens in windows (B, L + 1)."""
        inputs, wanted = batch[:, :-1].clamp(min=0), batch[:, 1:]
        net = self.net
        assert isinstance(net, MambaLM)
        if (group := active()) is not None:
            inputs, wanted = group.shard(inputs), group.shard(wanted)
        if self.training and self.graph_requested and inputs.is_cuda and self._steps_seen > 1:
            self.graph_requested = False  # not at the first step, whose FLOPs are counted
            capture(net.backbone, inputs)
        total = head_loss(net, net.backbone(inputs), wanted, PADDING)
        return mean_share(total, (wanted != PADDING).sum(), everywhere=self.training)

    def on_train_start(self) -> None:
        """Refuse what cannot be a graph before anything is trained."""
        super().on_train_start()
        if self.graph_requested and self.device.type == "cuda":
            check_graphs(self)

    def compiled_part(self) -> nn.Module:
        """Return the backbone: the loss does without the net's own forward."""
        assert isinstance(self.net, MambaLM)
        return self.net.backbone

    @torch.no_grad()
    def evaluate(self, batch: Tensor, stage: str) -> None:
        """Add the losses of a batch's tokens; every token weighs the same."""
        self.losses[f"{stage}_"].update(self.loss(batch), weight=(batch[:, 1:] != PADDING).sum())  # pyright: ignore

    def batch_tokens(self, batch: Tensor) -> int:
        """Return the number of tokens that are read."""
        return batch[:, 1:].numel()

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte."""
        self._log_losses("val")

    def on_test_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte; leave the model that was tested."""
        self._log_losses("test")
        fast = getattr(self.trainer, "fast_dev_run", False)  # which leaves no run folder
        net = self.gather_net()
        if self.trainer.is_global_zero and not fast:
            self._save(net, Path(self.trainer.default_root_dir) / "model")

    def _log_losses(self, stage: str) -> None:
        metric = self.losses[f"{stage}_"]
        loss = metric.compute()  # pyright: ignore
        metric.reset()  # pyright: ignore
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/perplexity", loss.exp())
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TextData):
            tokens = max(1, len(data.windows[stage].tokens) - 1)
            self.log(f"{stage}/bits_per_byte", loss / math.log(2) * tokens / data.bytes[stage], prog_bar=True)

    def _save(self, net: nn.Module, folder: Path) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(net, MambaLM)
        save_lm(net, folder, overwrite=True)
        if isinstance(data, TextData) and isinstance(data.tokenizer, ByteTokenizer):
            save_byte_tokenizer(folder)
        elif isinstance(data, TextData) and data.tokenizer_file is not None:
            shutil.copyfile(data.tokenizer_file, folder / TOKENIZER)

    def add_to_report(self, report: Report) -> None:
        """Add the figures, a sample of text and the data."""
        names = {"test/perplexity": "perplexity per token", "test/bits_per_byte": "bits per byte"}
        found = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        rows = [{"measure": text, "value": found[name]} for name, text in names.items() if name in found]
        if rows:
            report.table("On held-out text", rows, "A uniform guess over bytes has 8 bits a byte.")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, TextData):
            return
        if self.sample_tokens:
            prompt, text = self._sample(data)
            report.table("A sample", [{"prompt": prompt, "continuation": text}], "Drawn with top-p 0.9, seed 0.")
        facts = {part: f"{data.bytes[part]:,} bytes, {len(data.windows[part]):,} windows" for part in data.windows}
        report.facts("Data", facts)

    @torch.no_grad()
    def _sample(self, data: TextData) -> tuple[str, str]:
        """The start of the test's text, and how the model goes on."""
        net = self.net
        assert isinstance(net, MambaLM)
        ids = data.windows["test"][0][: min(32, data.window)]
        ids = ids[ids != PADDING].to(net.lm_head.weight.device)
        drawn = generate(net, ids[None], self.sample_tokens, Sampling(top_p=0.9), seed=0).tokens[0]
        return data.tokenizer.decode(ids.tolist()), data.tokenizer.decode(drawn.tolist())
