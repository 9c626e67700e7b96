"""Fixtures that several files share."""

import contextlib
import sys
import types

import pytest


@pytest.fixture
def yacs(monkeypatch):
    """A context in which yacs seems installed; it gives the class of its configurations, a dict with attributes."""

    class CfgNode(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__["__immutable__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode

    @contextlib.contextmanager
    def installed():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
            patch.setitem(sys.modules, "yacs.config", module)
            yield CfgNode

    return installed
