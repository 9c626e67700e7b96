"""Published SaShiMi checkpoints become nets that generate, and exported nets stay what they were."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from audio.codec import Codec
from audio.export import export
from audio.net import SoundNet
from audio.published import load_published
from audio.sashimi import SashimiConfig
from audio.trained import Trained, load_trained, save_trained
from core.errors import UserError

S4 = {"d_state": 8, "n_ssm": 1}
NETS = {
    "standalone": SashimiConfig(4, 2, (2, 3), mixer="s4d", mixer_cfg=S4, mlp=2, unet=False),
    "unet": SashimiConfig(4, 1, (4, 2), mixer="s4d", mixer_cfg={"d_state": 4}, mlp=2),
    "tied": SashimiConfig(6, 3, (2,), expand=1, mixer="s4", mixer_cfg=S4, mlp=1),
    "bare": SashimiConfig(4, 1, (2,), mixer="s4", mixer_cfg={**S4, "glu": False}, unet=False),
}


def net_of(name: str) -> SoundNet:
    torch.manual_seed(0)
    return SoundNet(NETS[name]).eval()


def published(net: SoundNet, layout: str) -> dict[str, Tensor]:
    """The weights of a net as the authors' repository keeps them, in one of its layouts."""
    state = {"encoder.0.weight": net.embedding.weight.data, "decoder.0.output_transform.weight": net.head.weight.data}
    state["decoder.0.output_transform.bias"] = net.head.bias.data
    each = len(net.model.u_layers[0])  # type: ignore[arg-type]
    for key, value in net.model.state_dict().items():
        name, pooling = f"model.{key}", key.count(".linear.") and ".layer." not in key
        if layout == "flat" and key.startswith("u_layers."):
            _, stage, layer, rest = key.split(".", 3)
            name = f"model.u_layers.{int(stage) * each + int(layer)}.{rest}"
        if pooling and value.ndim == 2 and layout == "standalone":
            value = value[:, :, None]
        elif pooling and value.ndim == 2:
            value = value.t().contiguous()
        if pooling and value.ndim == 2 and layout == "paper":
            state[f"{name}_g"], state[f"{name}_v"] = value.norm(dim=1, keepdim=True), 3 * value
            continue
        state[name] = value[:, :, None] if layout == "standalone" and ".ff." in key and value.ndim == 2 else value
    return state


@torch.no_grad()
@pytest.mark.parametrize("layout", ["standalone", "paper", "flat"])
@pytest.mark.parametrize("name", NETS)
def test_a_published_net_is_the_same_net(name: str, layout: str, tmp_path: Path) -> None:
    net, levels = net_of(name), torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    state = published(net, layout)
    torch.save({"state_dict": state, "epoch": 3} if layout == "flat" else state, tmp_path / "net.pt")
    export(str(tmp_path / "net.pt"), str(tmp_path / "net.safetensors"), published=True, scheme="linear", sample_rate=9)
    found = load_trained(tmp_path / "net.safetensors")
    options = {**NETS[name].mixer_cfg, "glu": NETS[name].mixer_cfg.get("glu", True)}
    assert found.net.config.mixer_cfg == {"n_ssm": None, **options}
    assert (found.codec, found.sample_rate) == (Codec("linear"), 9)
    torch.testing.assert_close(
        load_published(tmp_path / "net.pt", Codec()).net(levels), net(levels), atol=1e-5, rtol=1e-5
    )
    assert (found.net(levels) - net(levels)).norm() < 2e-3 * net(levels).norm()


def test_what_is_no_published_net_is_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "net.pt", published(net_of("bare"), "paper")
    for change, words in (
        ({"encoder.0.weight": None}, "encoder"), ({"model.d_layers.0.linear.bias": None}, "no poolings"),
        ({"encoder.0.weight": torch.zeros(64, 4)}, "wrong shape"), ({"model.norm.bias": None}, "norm.bias"),
    ):  # fmt: skip
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, path)
        with pytest.raises(UserError, match=words):
            load_published(path, Codec())
    torch.save({"state_dict": state, "hyper_parameters": tmp_path}, path)
    with pytest.raises(UserError, match="keep its weights alone"):
        load_published(path, Codec())
    with pytest.raises(UserError, match="no published checkpoint at"):
        load_published(tmp_path / "absent.pt", Codec())


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["s4d", "s4"])
def test_an_exported_net_keeps_its_periods(mixer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = SoundNet(SashimiConfig(8, 1, (2,), mixer=mixer, mixer_cfg={"d_state": 64}), 32).eval()
    levels = torch.randint(0, 32, (1, 4000), generator=torch.Generator().manual_seed(1))
    save_trained(Trained(net, Codec(levels=32), 8000), tmp_path / "net.safetensors")
    got, want = load_trained(tmp_path / "net.safetensors").net(levels), net(levels)
    assert (got - want).norm() < 1e-3 * want.norm()


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.ckpt"
    for config in ({"d_model": 4}, {"d_model": 4, "pool": [2], "hue": 1}, {"d_model": 4, "pool": [2], "mixer": "rnn"}):
        torch.save({"audio": {"config": config, "codec": {}, "sample_rate": 8000}, "state_dict": {}}, path)
        with pytest.raises(UserError, match="another version"):
            load_trained(path)
