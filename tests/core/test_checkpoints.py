"""Saving and loading: round trips, published layouts, atomic writes, and one clear message for what does not fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fill import fill_input
from safetensors.torch import save_file

from core import checkpoints
from core.checkpoints import load_into, read_weights, save_weights
from core.errors import UserError
from core.lm import MambaConfig, MambaLM
from core.published import complete_tied_head, export_transformers, load_lm, rename_transformers, save_lm

CONFIG = MambaConfig(d_model=8, n_layer=2, vocab_size=21, ssm_cfg={"d_state": 3, "layer": "Mamba1"})


def lm(**options) -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(MambaConfig(**{**asdict(CONFIG), **options}))


def assert_same(got: MambaLM, want: MambaLM) -> None:
    assert list(got.state_dict()) == list(want.state_dict())
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    ids = fill_input("ids", (2, 5), 21)
    assert torch.equal(got(ids), want(ids))


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "rms_norm": False, "d_intermediate": 16}])
def test_round_trip(tmp_path: Path, options: dict):
    model = lm(**options)
    save_lm(model, tmp_path / "new" / "folder")
    again = load_lm(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert_same(again, model)
    assert (again.lm_head.weight is again.backbone.embedding.weight) == again.config.tie_embeddings
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_load_dtype(tmp_path: Path):
    save_lm(lm(), tmp_path)
    model = load_lm(tmp_path, dtype=torch.bfloat16)
    mixer = model.backbone.layers[0].mixer
    assert (mixer.in_proj.weight.dtype, mixer.A_log.dtype) == (torch.bfloat16, torch.float32)


def test_nothing_is_overwritten_unasked(tmp_path: Path):
    save_lm(lm(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"config.json exists"):
        save_lm(lm(d_model=16), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    save_lm(lm(d_model=16), tmp_path, overwrite=True)
    assert load_lm(tmp_path).config.d_model == 16


def test_a_config_alone_blocks_the_weights_too(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="exists"):
        save_lm(lm(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(2)}, path)

    def fails(tensors: dict, filename: Path, metadata: dict) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_weights({"a": torch.zeros(2)}, path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert torch.equal(read_weights(path)["a"], torch.ones(2))


def test_shared_and_strided_tensors(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "b": base, "c": base.T, "d": base[1]}
    save_weights(state, tmp_path / "w.safetensors")
    for name, tensor in read_weights(tmp_path / "w.safetensors").items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("with_head", [True, False])
def test_published_folder(tmp_path: Path, with_head: bool):
    """mamba_ssm's layout: config.json with its fields, pickled weights, the tied head stored or not."""
    model = lm()
    state = dict(model.state_dict())
    if not with_head:
        del state["lm_head.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    old = {k: v for k, v in asdict(model.config).items() if k not in ("tie_embeddings", "d_intermediate", "attn_cfg")}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert_same(load_lm(tmp_path), model)


def write_transformers(folder: Path, model: MambaLM, shards: int = 1) -> None:
    config = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 8, "state_size": 3,
        "num_hidden_layers": 2, "vocab_size": 24, "conv_kernel": 4, "expand": 2, "intermediate_size": 16,
        "time_step_rank": 1, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
        "layer_norm_epsilon": 1e-5, "residual_in_fp32": True, "d_model": 8, "n_layer": 2, "ssm_cfg": {},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    state = {name.replace("embedding", "embeddings"): t for name, t in model.state_dict().items()}
    del state["lm_head.weight"]
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return
    where = {name: f"model-0000{i % shards}.safetensors" for i, name in enumerate(state)}
    for shard in set(where.values()):
        save_file({name: state[name] for name in state if where[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_folder(tmp_path: Path, shards: int):
    model = lm()
    write_transformers(tmp_path, model, shards)
    assert_same(load_lm(tmp_path), model)


def test_conversions_are_pure():
    state = {"backbone.embeddings.weight": torch.zeros(1)}
    renamed = rename_transformers(state)
    completed = complete_tied_head(renamed)
    assert list(state) == ["backbone.embeddings.weight"]
    assert list(renamed) == ["backbone.embedding.weight"]
    assert completed["lm_head.weight"] is renamed["backbone.embedding.weight"]


def test_untied_head_is_not_made_up(tmp_path: Path):
    model = lm(tie_embeddings=False)
    save_lm(model, tmp_path)
    state = dict(model.state_dict())
    del state["lm_head.weight"]
    save_weights(state, tmp_path / "model.safetensors", overwrite=True)
    with pytest.raises(UserError, match=r"1 missing \(lm_head.weight\)"):
        load_lm(tmp_path)


def test_one_message_lists_all_that_does_not_fit():
    model = lm()
    state = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del state["backbone.norm_f.weight"]
    state["head.weight"] = torch.zeros(3)
    state["lm_head.weight"] = torch.zeros(7, 8)
    with pytest.raises(UserError) as caught:
        load_into(model, state, "some.safetensors")
    message = str(caught.value)
    for part in (
        "some.safetensors does not fit MambaLM",
        "1 missing (backbone.norm_f.weight)",
        "1 unexpected (head.weight)",
        "1 wrong shape (lm_head.weight (7, 8) instead of (24, 8))",
    ):
        assert part in message
    assert "\n" not in message
    for name, tensor in model.state_dict().items():  # nothing half-loaded
        assert torch.equal(tensor, before[name])


def test_long_lists_are_cut():
    with pytest.raises(UserError, match=r"23 missing \(.*, and 19 more\)"):
        load_into(lm(), {}, "empty")


EXPORTED = {
    "mamba": dict(ssm_cfg={"d_state": 3}),
    "mamba2": dict(ssm_cfg={"layer": "Mamba2", "d_state": 4, "headdim": 8, "expand": 2, "chunk_size": 16}),
    "mamba2 untied": dict(ssm_cfg={"layer": "Mamba2", "d_state": 4, "headdim": 4, "bias": True}, tie_embeddings=False),
}
# What transformers calls the entries of a layer, from its MambaForCausalLM and Mamba2ForCausalLM.
MIXERS = {
    "mamba": {"A_log", "D", "conv1d.bias", "conv1d.weight", "dt_proj.bias", "dt_proj.weight", "in_proj.weight",
              "out_proj.weight", "x_proj.weight"},
    "mamba2": {"A_log", "D", "conv1d.bias", "conv1d.weight", "dt_bias", "in_proj.weight", "norm.weight",
               "out_proj.weight"},
}  # fmt: skip
MIXERS["mamba2 untied"] = MIXERS["mamba2"] | {"in_proj.bias", "out_proj.bias"}


@pytest.mark.parametrize("name", EXPORTED)
def test_export_to_transformers(tmp_path: Path, name: str):
    model = lm(**EXPORTED[name])
    export_transformers(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == name.split()[0]
    assert (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]) == (24, 8, 2)
    head = set() if model.config.tie_embeddings else {"lm_head.weight"}
    layers = {
        f"backbone.layers.{i}.{key}" for i in (0, 1) for key in ({f"mixer.{m}" for m in MIXERS[name]} | {"norm.weight"})
    }
    assert set(read_weights(tmp_path / "model.safetensors")) == (
        layers | head | {"backbone.embeddings.weight", "backbone.norm_f.weight"}
    )
    again = load_lm(tmp_path)
    assert_same(again, model)
    assert again.config.tie_embeddings == model.config.tie_embeddings
    export_transformers(again, tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "config.json").read_text()) == config


def test_infinity_as_transformers_writes_it(tmp_path: Path):
    model = lm(**EXPORTED["mamba2"])
    export_transformers(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["time_step_limit"][1] = {"__float__": "Infinity"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(load_lm(tmp_path), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_intermediate": 8}, "transformers has no model with d_intermediate = 8; save it with save_pretrained"),
        ({"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2}}, r"attn_layer_idx = \[0\]"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 4, "norm_before_gate": True}}, "ssm_cfg.norm_before_gate = True"),
        ({"rms_norm": False}, "rms_norm = False"),
    ],
)
def test_export_refuses(tmp_path: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        export_transformers(lm(**options), tmp_path)


def test_model_methods(tmp_path: Path):
    model = lm(attn_layer_idx=[1], attn_cfg={"num_heads": 2, "rotary_emb_dim": 4, "d_conv": 3})
    model.save_pretrained(tmp_path)
    assert_same(MambaLM.from_pretrained(tmp_path), model)
    assert MambaLM.from_pretrained(tmp_path, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="exists"):
        model.save_pretrained(tmp_path)


def test_loading_draws_no_weights_twice(tmp_path: Path):
    """The state of the random generator after building is that of one construction: nothing is initialised again."""
    torch.manual_seed(0)
    MambaLM(CONFIG)
    want = torch.rand(1)
    save_lm(lm(), tmp_path)
    torch.manual_seed(0)
    load_lm(tmp_path)
    assert torch.equal(torch.rand(1), want)


def text_named_bin(folder: Path) -> None:
    save_lm(lm(), folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("hello, I am no checkpoint\n" * 9)


def truncated(folder: Path) -> None:
    save_lm(lm(), folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def whole_module(folder: Path) -> None:
    save_lm(lm(), folder)
    (folder / "model.safetensors").unlink()
    torch.save(lm(), folder / "pytorch_model.bin")


def training_checkpoint(folder: Path) -> None:
    save_lm(lm(), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": lm().state_dict(), "epoch": 3}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    save_lm(lm(), folder)
    (folder / "model.safetensors").unlink()


def lost_shard(folder: Path) -> None:
    write_transformers(folder, lm(), shards=2)
    (folder / "model-00001.safetensors").unlink()


def config_with(**values):
    def write(folder: Path) -> None:
        write_transformers(folder, lm())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **values}.items() if v != "cut"}))

    return write


def text_config(text: str):
    def write(folder: Path) -> None:
        save_lm(lm(), folder)
        (folder / "config.json").write_text(text)

    return write


def index(text: str):
    def write(folder: Path) -> None:
        no_weights(folder)
        (folder / "model.safetensors.index.json").write_text(text)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "no .*config.json; wanted a folder"),
        (no_weights, "no weights in .*; wanted one of model.safetensors"),
        (text_named_bin, "pytorch_model.bin is not a plain state_dict"),
        (truncated, "model.safetensors is not a whole file"),
        (whole_module, "pytorch_model.bin is not a plain state_dict"),
        (training_checkpoint, "more than tensors"),
        (lost_shard, "no file .*model-00001.safetensors"),
        (text_config("{broken"), "not a JSON file"),
        (text_config("[1]"), "got a JSON list"),
        (text_config('{"d_modle": 8}'), "did you mean 'd_model'"),
        (text_config('{"ssm_cfg": {"layer": "Mamba2x"}, "d_model": 8}'), "config.json: ssm_cfg.layer: got 'Mamba2x'"),
        (index("{}"), "index.json has no weight_map, wanted one of"),
        (index('{"weight_map": [1]}'), "index.json has no weight_map"),
        (index('{"weight_map": {"a": 1}}'), "index.json has no weight_map"),
        (text_config('{"d_model": "wide", "n_layer": 1}'), "config.json: d_model: got 'wide', wanted a whole number"),
        (text_config('{"n_layer": 2.5}'), "config.json: n_layer: got 2.5, wanted a whole number"),
        (text_config('{"ssm_cfg": null}'), "config.json: ssm_cfg: got None, wanted an object with named entries"),
        (text_config('{"attn_layer_idx": 1}'), "attn_layer_idx: got 1, wanted a list of whole numbers"),
        (text_config('{"attn_layer_idx": ["1"]}'), r"attn_layer_idx: got \['1'\], wanted a list of whole numbers"),
        (text_config('{"rms_norm": 1}'), "rms_norm: got 1, wanted true or false"),
        (text_config('{"pad_vocab_size_multiple": 0}'), "pad_vocab_size_multiple: got 0, wanted at least 1"),
        (text_config('{"vocab_size": 0}'), "vocab_size: got 0, wanted at least 1"),
        (
            text_config('{"d_model": 8, "n_layer": 1, "vocab_size": 9, "ssm_cfg": {"d_state": "four"}}'),
            "config.json: a value in ssm_cfg or attn_cfg is of the wrong type",
        ),
        (config_with(num_hidden_layers="two"), "config.json: n_layer: got 'two', wanted a whole number"),
        (config_with(hidden_size=None), "config.json: a value is of the wrong type"),
        (config_with(model_type="gpt2"), 'model_type: got \'gpt2\', wanted "mamba" or "mamba2"'),
        (config_with(layer_norm_epsilon=1e-6), "layer_norm_epsilon: got 1e-06"),
        (config_with(hidden_size="cut"), "no entry 'hidden_size'"),
        (config_with(state_size=4), "wrong shape"),
    ],
)
def test_bad_folders(tmp_path: Path, write, message: str):
    write(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_lm(tmp_path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path):
    save_lm(lm(), tmp_path)
    with pytest.raises(UserError, match=r"model.safetensors is a file; wanted the folder that holds it"):
        load_lm(tmp_path / "model.safetensors")
