"""Reads a golden file: its inputs and parameters, filled by the rules of ``fill.py``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fill import fill_input, fill_param, hash_uniform

FOLDER = Path(__file__).parent


def load_golden(name: str) -> dict[str, Any]:
    """The file ``tests/golden/<name>.json``."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def golden_cases(name: str) -> dict[str, dict[str, Any]]:
    """All cases of a golden file by name; the main one is called ``main``."""
    golden = load_golden(name)
    return {"main": golden, **golden.get("cases", {})}


def golden_state_dict(case: dict[str, Any], model: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """The state_dict of a case; entries marked ``keep`` are taken from ``model``."""
    names = {"torch": torch, "F": F, "math": math, "fill_param": fill_param, "hash_uniform": hash_uniform}
    state: dict[str, torch.Tensor] = {}
    for key, shape in case["params"].items():
        rule = case.get("overrides", {}).get(key, {})
        if "same_as" in rule:
            state[key] = state[rule["same_as"]]
        elif "values" in rule:
            state[key] = torch.tensor(rule["values"]).reshape(shape)
        elif "expr" in rule:
            state[key] = eval(rule["expr"], {**names, "key": key, "shape": tuple(shape)})
        elif "keep" not in rule:
            state[key] = fill_param(key, shape)
        elif model is not None:
            state[key] = model.state_dict()[key]
    return state


def golden_inputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs of a case by name."""
    names = {"torch": torch, "F": F, "math": math, "fill_input": fill_input}
    inputs: dict[str, torch.Tensor] = {}
    for name, spec in case["inputs"].items():
        if "values" in spec:
            inputs[name] = torch.tensor(spec["values"], dtype=getattr(torch, spec.get("dtype", "int64")))
        elif "expr" in spec:
            inputs[name] = eval(spec["expr"], {**names, "shape": tuple(spec["shape"])})
        else:
            inputs[name] = fill_input(name, spec["shape"], spec.get("vocab"))
    return inputs
