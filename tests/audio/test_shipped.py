"""The weights that come with the project: small, licensed, and better than noise by their own judge."""

import pytest
import torch

from audio import judge, trained
from audio.judge import load_judge
from audio.metrics import frechet_distance
from audio.sampling import generate_levels
from audio.trained import load_trained


def test_weights_are_small_and_say_what_they_are() -> None:
    assert trained.SHIPPED.stat().st_size <= 8_000_000
    assert judge.SHIPPED.stat().st_size <= 500_000
    assert "CC BY-SA 4.0" in (trained.SHIPPED.parent / "CARD.md").read_text()
    speaker, listener = load_trained(), load_judge()
    assert (speaker.sample_rate, speaker.codec.normalize, len(speaker.told)) == (8000, "peak", 60)
    assert speaker.guide() == (1.0, speaker.start("any"))
    assert listener.class_names == tuple("0123456789")
    assert listener.reference is not None
    assert listener.reference.clips == 2520
    assert len(speaker.starts(6, ["7"])) == 6
    clip = generate_levels(speaker.net, speaker.start("7_theo"), 1, 20, generator=torch.Generator().manual_seed(0))
    assert 0 <= int(clip.min()) <= int(clip.max()) < 256


def test_the_judge_does_not_trust_noise() -> None:
    listener = load_judge()
    noise = [torch.randn(4000, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    features, shares = listener(noise)
    assert float(shares.amax(1).mean()) < 0.5
    assert listener.reference is not None
    assert frechet_distance(features, listener.reference.moments) > 20
    _, shares = listener([torch.zeros(4000), torch.full((300,), 0.01), noise[0]])
    torch.testing.assert_close(shares[:2], torch.full((2, 10), 0.1))
    assert float(shares[2].max()) > 0.11


@pytest.mark.slow
def test_what_is_said_is_heard() -> None:
    speaker, listener = load_trained(), load_judge()
    starts = speaker.starts(60)
    generator = torch.Generator().manual_seed(0)
    levels = generate_levels(speaker.net, starts, 60, 5600, guidance=speaker.guide(), generator=generator)
    features, shares = listener([speaker.codec.decode(clip) for clip in levels])
    asked = [speaker.class_names[start // 256][0] for start in starts]
    heard = [listener.class_names[i] for i in shares.argmax(1).tolist()]
    assert sum(a == h for a, h in zip(asked, heard, strict=True)) >= 22  # of 60; 34 expected, by chance 6
    assert float(shares.amax(1).mean()) > 0.65  # noise 0.28, recordings 0.93
    assert listener.reference is not None
    assert frechet_distance(features, listener.reference.moments) < 10  # noise 45
