"""Files of other programs: what is read from them, and that nothing in them is run."""

import pickle
import sys
import types

import pytest
import safetensors.torch
import torch

from vision.models.loading import read


@pytest.fixture
def yacs_file(tmp_path, monkeypatch):
    """A file as VMamba's training writes it: weights beside a yacs configuration, a dict with attributes."""

    class CfgNode(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__["__immutable__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        node = CfgNode({"MODEL": CfgNode({"NAME": "vssm"}), "SIZES": [1, 2]})
        torch.save({"model": {"weight": torch.ones(2)}, "config": node}, tmp_path / "vssm.pth")
    return tmp_path / "vssm.pth"


def test_yacs_configurations_are_read_without_yacs(yacs_file):
    found = read(yacs_file)
    assert found["config"] == {"MODEL": {"NAME": "vssm"}, "SIZES": [1, 2]}
    assert torch.equal(found["model"]["weight"], torch.ones(2))
    with pytest.raises(pickle.UnpicklingError, match=r"yacs\.config"):  # no longer allowed afterwards
        torch.load(yacs_file, weights_only=True)


def test_safetensors_are_read(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert torch.equal(read(tmp_path / "a.safetensors")["weight"], torch.ones(2))
