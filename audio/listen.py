"""What a person hears and sees of generated sound: players and log-mel spectrograms on a page.

Dimension letters: L samples.
"""

import base64
import html
import io
import math
from collections.abc import Iterable

import soundfile
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from core.training.report import Report

MELS = 64
RANGE_DB = 80  # what is fainter than the loudest by more is drawn black


def mel_spectrogram(wave: Tensor, sample_rate: int) -> Tensor:
    """Log-mel spectrogram, with frames of about 64 ms every 8 ms.

    Args:
        wave: (L,) samples.
        sample_rate: In Hz.

    Returns:
        (mel bands, frames) in dB, at most 80 dB below the loudest.
    """
    from torchaudio.transforms import AmplitudeToDB, MelSpectrogram  # takes a second

    frame = max(256, 2 ** round(math.log2(0.064 * sample_rate)))
    wave = F.pad(wave.float(), (0, max(0, frame - len(wave))))
    transform = MelSpectrogram(sample_rate, n_fft=frame, hop_length=frame // 8, n_mels=MELS, f_min=40.0)
    return AmplitudeToDB("power", top_db=RANGE_DB)(transform(wave))


def draw_spectrogram(wave: Tensor, sample_rate: int) -> Figure:
    """Draws the log-mel spectrogram of samples (L,)."""
    figure = Figure(figsize=(4.2, 2.2), layout="constrained")
    axes = figure.subplots()
    image = mel_spectrogram(wave, sample_rate).numpy()
    seconds = max(len(wave) / sample_rate, 1e-3)
    axes.imshow(image, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, MELS))
    axes.set_xlabel("s", fontsize=8)
    axes.set_ylabel("mel band", fontsize=8)
    axes.tick_params(labelsize=7)
    return figure


def spectrogram_png(wave: Tensor, sample_rate: int) -> bytes:
    """The drawn spectrogram as a PNG file."""
    buffer = io.BytesIO()
    draw_spectrogram(wave, sample_rate).savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def add_players(
    report: Report, title: str, clips: Iterable[tuple[Tensor, str]], sample_rate: int, caption: str = ""
) -> None:
    """Adds a section with clips to listen to, each with its spectrogram; all of it is inside the page.

    Args:
        report: The page.
        title: Title of the section.
        clips: Samples (L,) in [-1, 1], and what stands below.
        sample_rate: In Hz.
        caption: Text below the section.
    """
    cells = []
    for wave, text in clips:
        buffer = io.BytesIO()
        soundfile.write(buffer, wave.clamp(-1, 1).cpu().numpy(), sample_rate, format="WAV", subtype="PCM_16")
        sound = base64.b64encode(buffer.getvalue()).decode("ascii")
        image = base64.b64encode(spectrogram_png(wave.cpu(), sample_rate)).decode("ascii")
        label = html.escape(text)
        cells.append(
            f'<figure><img src="data:image/png;base64,{image}" alt="spectrogram of {label}">'
            f'<audio controls style="width:100%;margin-top:.4rem" src="data:audio/wav;base64,{sound}"></audio>'
            f"<figcaption>{label}</figcaption></figure>"
        )
    style = "display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1.2rem"
    below = f'<p class="caption">{html.escape(caption)}</p>' if caption else ""
    report.html(title, f'<div style="{style}">{"".join(cells)}</div>{below}')
