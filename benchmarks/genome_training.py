"""Training steps on one sequence of 2^20 bases: ``python -m benchmarks.genome_training [--peers] [--length N]``.

Forward, loss and backward in bfloat16 autocast, as ``genomics.pretrain`` takes them, one sequence a step: tokens a
second and the peak of memory, with and without gradient checkpointing. Peers: mamba_ssm's language model of the same
size, and HyenaDNA as published, written with torch.fft (``fft_reference``), in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Timing, installed, require_gpu, row, write
from core.lm import MambaConfig, MambaLM
from genomics.hyenadna import HyenaDNA, HyenaDNAConfig

Model = Callable[[Tensor], Tensor]


def mamba(layers: int, width: int) -> nn.Module:
    """A Mamba language model of so many blocks."""
    return MambaLM(MambaConfig(d_model=width, n_layer=layers, vocab_size=12))


def hyena(layers: int, width: int, length: int) -> nn.Module:
    """HyenaDNA with the filters of the released models."""
    layer = {"l_max": length + 2, "emb_dim": 5, "filter_order": 64, "w": 10, "lr_pos_emb": 0.0}
    return HyenaDNA(HyenaDNAConfig(d_model=width, n_layer=layers, embed_dropout=0.0, layer=layer))


def fft_reference(model: nn.Module) -> None:
    """Make a HyenaDNA compute as the published code does: channels first, spectra kept, torch's own convolution."""
    for block in model.backbone.layers:  # type: ignore[union-attr]
        mixer = block.mixer

        def forward(x: Tensor, *_: Any, mixer: Any = mixer) -> Tensor:
            length = x.shape[1]
            u = mixer.in_proj(x).transpose(1, 2)
            short = mixer.short_filter
            u = F.conv1d(u, short.weight, short.bias, padding=2, groups=u.shape[1])[..., :length]
            gate, inner, v = u.split(mixer.d_model, dim=1)
            filter_fn = mixer.filter_fn
            h = filter_fn.implicit_filter(filter_fn.pos_emb.z[:, :length])
            h = h * (torch.exp(-filter_fn.pos_emb.t[:, :length] * filter_fn.modulation.deltas.abs()) + filter_fn.shift)
            k, v = h[0].T.float(), v * inner
            spectrum = torch.fft.rfft(k, n=2 * length) / (2 * length) * torch.fft.rfft(v.float(), n=2 * length)
            y = torch.fft.irfft(spectrum, n=2 * length, norm="forward")[..., :length] + v * filter_fn.bias[:, None]
            return mixer.out_proj((y.to(v.dtype) * gate).transpose(1, 2))

        mixer.forward = forward


def peer_mamba(layers: int, width: int) -> nn.Module:
    """mamba_ssm's language model."""
    from mamba_ssm.models.config_mamba import MambaConfig as PeerConfig  # pyright: ignore
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # pyright: ignore

    config = PeerConfig(d_model=width, n_layer=layers, vocab_size=12, ssm_cfg={"layer": "Mamba1"})

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MambaLMHeadModel(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits

    return Logits()


def measure_training(model: nn.Module, ids: Tensor, runs: int) -> Timing:
    """Milliseconds of forward, loss and backward, and the peak of memory above the parameters, in MiB."""

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    quantiles = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Timing(quantiles[0], quantiles[1], quantiles[2], (torch.cuda.max_memory_allocated() - before) / 2**20)


def main() -> None:
    """Prints a row a model and writes ``results/genome_training.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", action="store_true", help="also time the published models")
    parser.add_argument("--length", type=int, default=1 << 20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cases", help="names of models, by commas; all if left out")
    arguments = parser.parse_args()
    require_gpu("genome_training")
    length, rows = arguments.length, []
    ids = torch.randint(7, 11, (1, length + 1), device="cuda")
    cases: list[tuple[str, str, bool, Callable[[], nn.Module]]] = [
        ("target/mamba_6x128", "triscan", False, lambda: mamba(6, 128)),
        ("target/mamba_6x128", "mamba_ssm", False, lambda: peer_mamba(6, 128)),
        ("target/mamba_6x128_checkpointed", "triscan", True, lambda: mamba(6, 128)),
        ("target/hyena_6x128", "triscan", False, lambda: hyena(6, 128, length)),
        ("target/hyena_6x128", "torch", False, lambda: _published_hyena(length)),
        ("target/mamba_16x256_checkpointed", "triscan", True, lambda: mamba(16, 256)),
        ("target/mamba_16x256", "triscan", False, lambda: mamba(16, 256)),
        ("target/mamba_16x256", "mamba_ssm", False, lambda: peer_mamba(16, 256)),
    ]
    providers = {"triscan", *(("torch",) if arguments.peers else ())}
    if arguments.peers and installed("mamba_ssm"):
        providers.add("mamba_ssm")
    wanted = [f"target/{name}" for name in arguments.cases.split(",")] if arguments.cases else None
    for case, provider, recompute, build in cases:
        if provider not in providers or (wanted is not None and case not in wanted):
            continue
        try:
            model = build().cuda()
            if recompute:
                model.set_gradient_checkpointing()  # type: ignore[operator]
            timing = measure_training(model, ids, arguments.runs)
        except torch.cuda.OutOfMemoryError:
            print(f"{case} {provider}: does not fit", flush=True)
            continue
        finally:
            model = None
            torch.cuda.empty_cache()
        rows.append(row("genome_training", case, provider, "forward_backward", torch.bfloat16, timing, 0.0))
        write("genome_training", rows)  # as measured: a run that is cut keeps its rows
        print(f"    {length / timing.ms_p50 / 1000:.2f} M tokens/s, {timing.peak_mib / 1024:.1f} GiB", flush=True)


def _published_hyena(length: int) -> nn.Module:
    model = hyena(6, 128, length)
    fft_reference(model)
    return model


if __name__ == "__main__":
    main()
