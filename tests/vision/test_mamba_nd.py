"""Mamba-ND: published numbers and names, axis orders, merging, videos and checkpoints."""

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import golden_inputs, golden_state_dict, load_golden
from fill import check, fill_input

import vision  # noqa: F401  registers the models
from vision.models.mamba_nd import MambaND, MambaNDVideo, checkpoint_filter_fn
from vision.models.nd_block import PatchMerging, axis_order

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "d_state": 4, "num_classes": 5}


def small(**kwargs) -> MambaND:
    torch.manual_seed(0)
    return MambaND(**{**SMALL, "merge_after": (), **kwargs}).eval()


def video(**kwargs) -> MambaNDVideo:
    torch.manual_seed(0)
    return MambaNDVideo(**{**SMALL, "num_frames": 4, "tubelet": 2, "depth": 6, **kwargs}).eval()


def official(name: str) -> str:
    """The published name of a parameter of ours."""
    if name.startswith("head."):
        return name.replace("head.", "head.fc.")
    renamed = name.replace("patch_embed.proj.", "patch_embed.projection.")
    return "backbone." + renamed.replace("norm_f.", "ln1.").replace("fc_norm.", "ln2.")


def test_golden_logits_features_and_gradients():
    golden = load_golden("mamba_nd_a")
    config = golden["config"]
    model = timm.create_model(
        "mamba_nd_2d_small", img_size=32, patch_size=config["patch_size"], num_classes=10, merge_after=(),
        embed_dim=config["arch"]["embed_dims"], depth=2 * config["arch"]["num_layers"], d_state=config["d_state"],
    )  # fmt: skip
    assert {official(name): list(p.shape) for name, p in model.state_dict().items()} == golden["params"]
    model.load_state_dict(checkpoint_filter_fn({"state_dict": golden_state_dict(golden)}, model))
    model.eval()
    seen = {}
    model.patch_embed.register_forward_hook(lambda _, __, out: seen.update(patch_embed=out.flatten(1, 2)))
    model.layers[0].mixer.register_forward_hook(lambda _, __, out: seen.update({"layers.0.mixer": out}))
    for i in range(4):
        model.layers[i].register_forward_hook(lambda _, __, out, i=i: seen.update({f"layers.{i}": out[0] + out[1]}))
    model.norm_f.register_forward_hook(lambda _, __, out: seen.update(ln1=out[0]))
    x = golden_inputs(golden)["x"].requires_grad_()
    y = model(x)
    check(y, golden["outputs"]["y"])
    assert seen.keys() == golden["outputs"]["features"].keys()
    for name, summary in golden["outputs"]["features"].items():
        check(seen[name], summary)
    (y * fill_input("loss_weight", y.shape)).sum().backward()
    grads = {official(name): p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    for name, summary in golden["grads"].items():
        check(grads[name], summary)


def test_published_names():
    model = timm.create_model("mamba_nd_2d_small", device="meta")
    names = set(model.state_dict())
    assert {"layers.9.down_sample_layer.norm.weight", "layers.9.down_sample_layer.reduction.weight"} <= names
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 24.5
    assert [info["reduction"] for info in model.feature_info] == [8] * 9 + [16] * 15
    clips = timm.create_model("mamba_nd_3d_small_tubelet2", device="meta")
    assert clips.pos_embed.shape == (1, 16 * 14 * 14, 384)
    assert clips.patch_embed.proj.weight.shape == (384, 3, 2, 16, 16)
    assert len(clips.layers) == 36


def test_orders_of_a_video():
    grid, cpu = (2, 1, 3), torch.device("cpu")
    assert axis_order(grid, (0, 1, 2), cpu).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert axis_order(grid, (2, 1, 0), cpu).tolist() == [[0, 3, 1, 4, 2, 5]]
    layers = timm.create_model("test_mamba_nd_3d").layers
    assert [(layer.mixer.order, layer.mixer.reverse) for layer in layers] == [
        ([0, 1, 2], False), ([0, 1, 2], True), ([0, 2, 1], False), ([0, 2, 1], True), ([2, 1, 0], False),
        ([2, 1, 0], True),
    ]  # fmt: skip


def test_columns_are_rows_of_the_transposed_map():
    """A layer that walks columns equals, with its weights, one that walks rows on the transposed map."""
    layers = small().layers
    columns, rows = layers[2].mixer, layers[0].mixer
    rows.load_state_dict(columns.state_dict())
    x = torch.rand(2, 3, 5, 32)
    walked = columns(x.flatten(1, 2), [3, 5]).unflatten(1, [3, 5])
    wanted = rows(x.transpose(1, 2).flatten(1, 2), [5, 3]).unflatten(1, [5, 3]).transpose(1, 2)
    torch.testing.assert_close(walked, wanted)


@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_merging_is_an_unfolding(size):
    merging = PatchMerging(8)
    x = torch.rand(2, 8, *size)
    tokens, grid = merging(x.flatten(2).transpose(1, 2), list(size))
    padded = F.pad(x, (0, size[1] % 2, 0, size[0] % 2))
    wanted = merging.reduction(merging.norm(F.unfold(padded, 2, stride=2).transpose(1, 2)))
    torch.testing.assert_close(tokens, wanted)
    assert grid == [(size[0] + 1) // 2, (size[1] + 1) // 2]


@pytest.mark.parametrize("size", [(32, 32), (20, 50)])
def test_any_size_runs(size):
    grid = tuple(-(-s // 8) for s in size)
    halved = tuple(-(-s // 2) for s in grid)
    assert small(merge_after=(1,)).forward_features(torch.rand(1, 3, *size)).shape == (1, *halved, 32)
    assert video().forward_features(torch.rand(1, 3, 5, *size)).shape == (1, 3, *grid, 32)


def test_an_image_is_one_frame():
    model, image = video(), torch.rand(2, 3, 32, 32)
    assert model.forward_features(image).shape == (2, 4, 4, 32)
    torch.testing.assert_close(model(image), model(image.unsqueeze(2)))
    torch.testing.assert_close(model(image), model(image.unsqueeze(2).expand(-1, -1, 2, -1, -1)))
    taps = model.forward_intermediates(torch.rand(1, 3, 4, 32, 32), [1], intermediates_only=True)
    assert taps[0].shape == (1, 32, 2, 4, 4)
    with pytest.raises(ValueError, match="video: got 3 axes"):
        model(torch.rand(3, 32, 32))


def test_a_frame_out_of_place_is_noticed():
    model = video()
    clip = torch.rand(1, 3, 4, 32, 32)
    assert not torch.allclose(model(clip), model(clip.flip(2)), rtol=1e-3)


def test_official_checkpoint_loads_and_adapts(tmp_path):
    model = small(merge_after=(1,))
    weights = {official(name): value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "meta": {"epoch": 300}}, tmp_path / "mamba2d_s.pth")
    overlay = {"file": str(tmp_path / "mamba2d_s.pth"), "num_classes": 5}

    def load(**kwargs):
        args = {**SMALL, "merge_after": (1,), **kwargs}
        return timm.create_model("mamba_nd_2d_small", pretrained=True, pretrained_cfg_overlay=overlay, **args)

    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load().eval()(image), model(image), rtol=0, atol=0)
    assert load(img_size=(48, 32), num_classes=3)(torch.rand(1, 3, 48, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"unexpected: layers\.1\.down_sample_layer"):
        load(merge_after=())


@pytest.mark.parametrize("head", ["head", "cls_head"])
def test_official_video_checkpoints_load(head):
    model = video(fc_norm=head == "head")
    if head == "head":  # Kinetics-400: a norm and a layer
        weights = {
            k.replace("head.", "head.1.").replace("fc_norm.", "head.0."): v for k, v in model.state_dict().items()
        }
    else:  # UCF101, HMDB51
        renamed = {k.replace("head.", "cls_head.fc_cls."): v for k, v in model.state_dict().items()}
        weights = {k if k.startswith("cls_head") else f"backbone.{k}": v for k, v in renamed.items()}
    weights = {k.replace("patch_embed.proj.", "patch_embed.projection."): v for k, v in weights.items()}
    loaded = video(fc_norm=head == "head")
    for p in loaded.parameters():
        p.data.zero_()
    loaded.load_state_dict(checkpoint_filter_fn({"state_dict": weights}, loaded))
    clip = torch.rand(1, 3, 4, 32, 32)
    torch.testing.assert_close(loaded(clip), model(clip), rtol=0, atol=0)
    longer = video(num_frames=8, fc_norm=head == "head")
    longer.load_state_dict(checkpoint_filter_fn({"state_dict": weights}, longer))


def test_an_image_model_starts_a_video_model():
    images, clips = small(), video()
    fresh = {name: value.clone() for name, value in clips.state_dict().items()}
    state = checkpoint_filter_fn({official(name): value for name, value in images.state_dict().items()}, clips)
    clips.load_state_dict(state)
    for i in range(4):
        assert torch.equal(clips.layers[i].mixer.in_proj.weight, images.layers[i].mixer.in_proj.weight)
    assert torch.equal(clips.layers[4].mixer.in_proj.weight, fresh["layers.4.mixer.in_proj.weight"])
    image = torch.rand(1, 3, 32, 32)  # a still clip's patches and positions are the image's
    tokens, grid = clips.embed(image.unsqueeze(2).expand(-1, -1, 4, -1, -1))
    assert grid == [2, 4, 4]
    torch.testing.assert_close(tokens[:, :16], images.embed(image)[0])
    torch.testing.assert_close(tokens[:, 16:], images.embed(image)[0])
