"""What the kernel on a GPU reads: weights in tiles, inputs in two parts, and where a state stands."""

import pytest
import torch

from audio.net import SoundNet
from audio.sashimi import SashimiConfig
from audio.stepping_cuda import fit, macros, source
from audio.stepping_layout import Layout
from audio.tiles import Stream, operand
from kernels import nvrtc


def multiply(stream: torch.Tensor, x: torch.Tensor, outputs: int, warps: int, half: bool) -> torch.Tensor:
    """The product as lanes hold it: lane 4 g + t has outputs g and g + 8, inputs 4 t to 4 t + 3 of each tile."""
    tiles, rows = outputs // 16, len(x) // 16
    y, at, size = torch.zeros(outputs), 0, 512 if half else 1024
    warps *= 2 if tiles > warps else 1  # a warp has two tiles at a time where there are more tiles than warps
    for first in range(0, tiles, warps):
        for k in range(rows):
            for m in range(first, min(first + warps, tiles)):
                for lane in range(32):
                    g, t = divmod(lane, 4)
                    given = x[16 * k + 4 * t : 16 * k + 4 * t + 4]
                    if half:
                        raw = stream[at + 16 * lane : at + 16 * lane + 16].view(torch.bfloat16).float()
                        pairs = raw.view(2, 2, 2)  # of inputs, g or g + 8, within the pair
                        weight = pairs.transpose(0, 1).reshape(2, 4)
                    else:
                        parts = [stream[at + h + 16 * lane : at + h + 16 * lane + 16] for h in (0, 512)]
                        quads = (
                            torch.cat(parts).view(torch.float32).view(2, 2, 2)
                        )  # half of the tile, input, g or g + 8
                        weight = quads.permute(2, 0, 1).reshape(2, 4)
                    y[16 * m + g] += weight[0] @ given
                    y[16 * m + g + 8] += weight[1] @ given
                at += size
    assert at == len(stream)
    return y


@pytest.mark.parametrize("half", [False, True])
def test_tiles_hold_a_product(half: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=generator)
    x = torch.nn.functional.pad(torch.randn(24, generator=generator), (0, 8))
    stream = Stream(half, warps=2)
    stream.product(weight, None)
    got = multiply(torch.from_numpy(stream.bytes()), x, 48, 2, half)
    want = (weight.bfloat16() if half else weight).float() @ x[:24]
    torch.testing.assert_close(got[:40], want)
    assert not got[40:].any()


def test_inputs_keep_16_bits_in_two_parts() -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    parts = operand(x, half=True).view(torch.bfloat16).view(3, 4, 2, 4).float()
    assert ((parts.sum(2).flatten(1) - x).abs() <= x.abs() * 2**-16).all()
    assert torch.equal(operand(x, half=False), x)


def test_a_layout_knows_how_far_its_state_is_and_what_fits() -> None:
    net = SoundNet(SashimiConfig(16, 1, (2, 3), mixer_cfg={"d_state": 4}), 32).eval()
    with torch.no_grad():
        for seen in (1, 4, 6, 11):
            _, state = net.forward_state(torch.zeros(2, seen, dtype=torch.int64), net.init_state(2))
            layout = Layout(net, state, 2, False, 16)
            assert layout.seen == seen % 6
            assert layout.state.shape[0] == 2
    ring, shared = fit(layout, 2)
    assert ring + 8 * layout.words < shared <= 227 << 10
    layout.words *= 20
    with pytest.raises(ValueError, match=r"8 clips need .* wanted <= 232,448"):
        fit(layout, 8)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_the_kernel_compiles(half: bool) -> None:
    net = SoundNet(SashimiConfig(16, 1, (2,), mlp=2, centre="s4d"), 32).eval()
    layout = Layout(net, net.init_state(1), 2, half, 16)
    code = nvrtc.compile_cubin(source(), macros(layout, 2, fit(layout, 2)[0]), "sm_90a")
    assert code[:4] == b"\x7fELF"
