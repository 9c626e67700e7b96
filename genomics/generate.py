"""Generates DNA: ``python -m genomics.generate MODEL --prompt ACGT`` writes sequences to a FASTA file."""

from typing import Any

import torch
from torch import Tensor, nn

from core.cli import run
from core.errors import UserError
from core.generate import Sampling, stream
from core.training.report import Report
from genomics.fasta import Fasta
from genomics.inference import load_model
from genomics.output import Results
from genomics.vocabulary import BOS, A, T, decode, encode


class BasesOnly(nn.Module):
    """A language model whose head knows only A, C, G and T, as ``core.generate`` takes it."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.backbone, self.config, self.init_state = net.backbone, net.config, net.init_state
        self.lm_head = _BasesHead(net.lm_head)


class _BasesHead(nn.Module):
    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self._head = head.weight, head

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden)
        keep = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        keep[A : T + 1] = True
        return logits.masked_fill(~keep, float("-inf"))


def generate(
    model: str,
    prompt: str = "",
    prompt_fasta: str | None = None,
    length: int = 1000,
    count: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    out: str | None = None,
) -> None:
    """Writes generated.fa: the prompt and what a causal model makes follow it; only A, C, G and T are drawn.

    Args:
        model: Checkpoint, run folder, folder with config.json, or name on the Hugging Face hub.
        prompt: Bases to go on from; empty begins a sequence.
        prompt_fasta: File whose records are the prompts instead, each continued count times.
        length: Bases to generate after each prompt.
        count: Sequences a prompt.
        temperature: Below 1 the likely bases become likelier; 0 takes the most likely one.
        top_k: Draw from the so many likeliest bases; 0 is all.
        top_p: Draw from the likeliest bases that together reach this probability; 1 is all.
        seed: The same seed gives the same sequences on the same machine.
        device: cpu, cuda, or auto.
        dtype: float32 or bfloat16.
        out: Folder for the results; null is the next one under runs/genomics/generate.
    """
    if length < 1 or count < 1:
        raise UserError(f"--length is {length} and --count {count}; wanted both at least 1")
    loaded = load_model(model, device, dtype)
    if not loaded.causal or loaded.classifier is not None:
        raise UserError("only a causal language model can go on with a sequence; give one of genomics.pretrain")
    try:
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    prompts = {"generated": encode(prompt.upper(), "--prompt")}
    if prompt_fasta is not None:
        records = Fasta(prompt_fasta)
        prompts = {name: records.read(name) for name in records.lengths}
    longest = loaded.longest
    net: Any = BasesOnly(loaded.net)
    with Results("generate", out) as results, (results.path / "generated.fa").open("w", encoding="utf-8") as file:
        for number, (name, ids) in enumerate(prompts.items()):
            tokens = ids.tolist() if loaded.start is None and len(ids) else [BOS, *ids.tolist()]
            if longest is not None and len(tokens) + length > longest:
                raise UserError(
                    f"{name}: {len(tokens)} tokens and {length} bases exceed the model's {longest:,} positions"
                )
            start = torch.tensor([tokens] * count, device=loaded.device)
            with torch.inference_mode():
                steps = [step.tokens for step in stream(net, start, length, sampling, seed=seed + number)]
            for i, row in enumerate(torch.stack(steps, dim=1).tolist()):
                bases = decode(ids) + decode(row)
                lines = "\n".join(bases[j : j + 80] for j in range(0, len(bases), 80))
                file.write(f">{name}_{i + 1} prompt={len(ids)} seed={seed + number}\n{lines}\n")
        made = len(prompts) * count
        report = Report("Generated DNA", f"{made}", f"sequences of {length:,} new bases")
        report.facts(
            "Sampling", {"model": model, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        )
        results.finish({"sequences": made, "bases": made * length}, report)


if __name__ == "__main__":
    run(generate)
