"""Generates DNA: ``python -m genomics.generate MODEL --prompt ACGT`` writes sequences to a FASTA file."""

from typing import Any

import torch
from torch import Tensor

from core.cli import run
from core.errors import UserError
from core.generate import generate as decode_tokens
from core.lm import MambaLM
from core.sampling import Sampling, sample
from core.training.report import Report
from genomics.fasta import open_genome
from genomics.inference import load_model
from genomics.output import Results
from genomics.vocabulary import BOS, A, T, decode, encode

PREFILL = 65536  # tokens of all prompts that go through the model at once


@torch.inference_mode()
def continuations(net: Any, prompts: Tensor, length: int, sampling: Sampling, seed: int) -> Tensor:
    """Draws A, C, G and T after prompts, token after token from the model's state; any causal model of DNA has one.

    Models on ``core.lm`` go through ``core.generate``, on NVIDIA GPUs as one CUDA graph a step. HyenaDNA, whose state
    grows, goes through its ``forward_state``.

    Args:
        net: The model.
        prompts: (B, L) int64.
        length: Bases to draw for each.
        sampling: How they are drawn.
        seed: Of the draws.

    Returns:
        (B, length) int64.
    """
    piece = max(1, PREFILL // len(prompts))
    if isinstance(net, MambaLM):
        bases = range(A, T + 1)
        made = decode_tokens(net, prompts, length, sampling, allowed_tokens=bases, seed=seed, prefill_chunk=piece)
        return made.tokens
    generator = torch.Generator(prompts.device).manual_seed(seed)
    state, hidden, drawn = net.init_state(len(prompts)), None, []
    for ids in prompts.split(piece, dim=1):
        hidden, state = net.backbone.forward_state(ids, state)
    while True:
        assert hidden is not None
        logits = net.lm_head(hidden[:, -1])[:, A : T + 1].float()
        drawn.append(A + sample(logits, sampling, generator))
        if len(drawn) == length:
            return torch.stack(drawn, dim=1)
        hidden, state = net.backbone.forward_state(drawn[-1][:, None], state)


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
        dtype: float32, bfloat16, or tf32: float32 whose products an NVIDIA GPU rounds to 11 bits.
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
        records = open_genome(prompt_fasta)
        prompts = {name: records.read(name) for name in records.lengths}
    longest = loaded.longest
    with Results("generate", out) as results, (results.path / "generated.fa").open("w", encoding="utf-8") as file:
        for number, (name, ids) in enumerate(prompts.items()):
            tokens = ids.tolist() if loaded.start is None and len(ids) else [BOS, *ids.tolist()]
            if longest is not None and len(tokens) + length > longest:
                raise UserError(
                    f"{name}: {len(tokens)} tokens and {length} bases exceed the model's {longest:,} positions"
                )
            start = torch.tensor([tokens] * count, device=loaded.device)
            for i, row in enumerate(continuations(loaded.net, start, length, sampling, seed + number).tolist()):
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
