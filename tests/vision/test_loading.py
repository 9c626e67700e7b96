"""Files of other programs: what is read from them, and that nothing in them is run."""

import pickle

import pytest
import safetensors.torch
import torch

from vision.models.loading import read


def test_yacs_configurations_are_read_without_yacs(yacs, tmp_path):
    path = tmp_path / "vssm.pth"
    with yacs() as node:
        config = node({"MODEL": node({"NAME": "vssm"}), "SIZES": [1, 2]})
        torch.save({"model": {"weight": torch.ones(2)}, "config": config}, path)
    found = read(path)
    assert found["config"] == {"MODEL": {"NAME": "vssm"}, "SIZES": [1, 2]}
    assert torch.equal(found["model"]["weight"], torch.ones(2))
    with pytest.raises(pickle.UnpicklingError, match=r"yacs\.config"):  # no longer allowed afterwards
        torch.load(path, weights_only=True)


def test_safetensors_are_read(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert torch.equal(read(tmp_path / "a.safetensors")["weight"], torch.ones(2))
