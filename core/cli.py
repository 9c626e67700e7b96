"""Commands: recipes over LightningCLI (``main``), single typed functions (``run``)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def main(
    domain: str,
    module: type,
    data: type,
    *,
    default_recipe: str | None = None,
    choose_data: bool = False,
    links: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run ``python -m DOMAIN.train [RECIPE] [STAGE] [options]`` and exit.

    Args:
        domain: Folder under ``configs/`` and name of the package.
        module: The training module; its constructor is ``--model.*``.
        data: The data module; its constructor is ``--data.*``.
        default_recipe: Recipe taken when the first argument is absent or an option; None demands one.
        choose_data: ``data`` is a base class: recipes name the subclass (``data: {class_path: ..., init_args: ...}``).
        links: Data attributes that go into the model's constructor, ``{"data.num_classes": "model.num_classes"}``.
        argv: Arguments instead of the process's own.
    """


def run(function: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Run one typed function as a command and exit: parameters without default are positionals, the rest options."""
