"""What jsonargparse says of a command's options, in one line and in the user's words."""

import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any


def explain(message: str, options: Sequence[str]) -> str:
    """Make one line of jsonargparse's message, and name the near option where one is misspelt.

    Args:
        message: As jsonargparse words it.
        options: The options there are, with their dashes.
    """
    if found := re.search(r"unrecognized arguments: (.*)", message, re.IGNORECASE):
        words = found.group(1).split()
        return _unknown([word.split("=")[0] for word in words if word.startswith("--")] or words, options)
    if found := re.search(r"does not accept (?:option|nested key) '([^']+)'", message):
        return _unknown(["--" + found.group(1)], options)
    if found := re.search(r"arguments are required: (.*)", message):
        names = [re.sub(r"^(fit|validate|test|predict)\.", "", name.strip()) for name in found.group(1).split(",")]
        called = [f"--{name}" if f"--{name}" in options else name for name in names]
        return f"required: {', '.join(called)}; --help lists all"
    if found := re.search(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
        return _bad_value(*found.groups())
    return _one_line(message)


def _bad_value(key: str, reason: str) -> str:
    """Word what is wrong with an option's value: what it is, and which types it may have."""
    if inner := re.search(
        r"Problem with given class_path '([^']+)':\n(.*?)(?=\n    - |\n  Given|\Z)", reason, re.DOTALL
    ):
        place, problem = inner.groups()
        if unknown := re.search(r"Option '([^']+)' is not accepted", problem):
            accepted = inspect.signature(resolve(place)).parameters
            return _unknown([f"--{key}.{unknown.group(1)}"], [f"--{key}.{name}" for name in accepted])
        if found := re.search(r'Parser key "([^"]+)":\s*(.*)', problem, re.DOTALL):
            return _bad_value(f"{key}.{found.group(1)}", found.group(2))
        return f"--{key}: {place}: {_one_line(problem)}"
    value = re.search(r"(?:Got value|Given value): (.*)", reason)
    given = value.group(1) if value else None
    if given and (nested := re.fullmatch(r"NestedArg\(key='(.*?)', val='?(.*?)'?\)", given)):
        key, given = f"{key}.{nested.group(1)}", nested.group(2)
    kinds = re.findall(r"Expected an? (<class '[^']+'>|typing\.Literal\[.*?\])(?:\.|$)", reason, re.MULTILINE)
    names = list(dict.fromkeys(_plain_type(kind) for kind in kinds))
    if "dot import path" in reason:
        names.insert(0, "a class (its name, or package.module.Name)")
    if given is None or not names:
        return f"--{key}: {_one_line(reason)}"
    return f"--{key} is {given!r}; wanted {' or '.join(names)}"


def first_reason(message: str) -> str:
    """Return what a class said of its arguments, where jsonargparse lists why each type of the option was refused."""
    found = re.search(r"^Errors:\n\s*- (.*)$", message, re.MULTILINE)
    return found.group(1) if found else message


def _plain_type(text: str) -> str:
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return f"one of {literal.group(1)}"
    name = text.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return {"NoneType": "null", "Iterable": "a list"}.get(name, name)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _unknown(words: Sequence[str], options: Sequence[str]) -> str:
    near = {word: _near_options(word, options) for word in words}
    parts = [f"{word} (did you mean {' or '.join(hits)}?)" if hits else word for word, hits in near.items()]
    return f"unknown {'option' if len(parts) == 1 else 'options'} {', '.join(parts)}; --help lists all"


def _near_options(word: str, options: Sequence[str]) -> list[str]:
    """Return the options like a word: on the whole, and in their last part, since the rest is common to many."""
    level = [option for option in options if ("." in option) == ("." in word)]

    def alike(option: str) -> bool:
        return difflib.SequenceMatcher(None, word.rpartition(".")[2], option.rpartition(".")[2]).ratio() > 0.5

    return [option for option in difflib.get_close_matches(word, level, n=2) if alike(option)]


def resolve(target: Any) -> Any:
    """The class behind a dotted name; a class as it is."""
    if not isinstance(target, str):
        return target
    place, _, name = target.rpartition(".")
    return getattr(importlib.import_module(place), name)
