"""Commands: ``main`` runs recipes over LightningCLI, ``run`` a single typed function.

Both print a user's mistake as one line, ``error: ...``, and exit with code 2; Ctrl-C exits with 130.
"""

import difflib
import inspect
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import core
from core.errors import UserError
from core.memory import keep_freed_memory
from core.wording import explain, resolve

if TYPE_CHECKING:  # these imports take seconds, and --help and a misspelt recipe do not wait for them
    from lightning import LightningDataModule

    from core.training.module import TrainingModule

CONFIGS = Path(core.__file__).resolve().parents[1] / "configs"
PATIENCE = 5.0  # seconds
STAGES = ("fit", "validate", "test", "predict")


def main(
    domain: str,
    module: "type[TrainingModule] | str",
    data: "type[LightningDataModule] | str",
    *,
    command: str = "train",
    default_recipe: str | None = None,
    choose_data: bool = False,
    links: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
    configs: Path = CONFIGS,
    folder: str | None = None,
) -> None:
    """Run ``python -m DOMAIN.COMMAND [RECIPE] [STAGE] [options]``.

    ``sys.argv`` stays as it is: with several devices, the other processes are started from it.

    Args:
        domain: Name of the package and of its folder under ``configs/``.
        module: The training module, whose constructor is ``--model.*``. A class, or better its dotted name
            (``vision.module.Classifier``): that is imported only when it is needed.
        data: The data module, whose constructor is ``--data.*``; a class or its dotted name.
        command: Name of the module that calls this, for help and for the hints on how to go on.
        default_recipe: Recipe taken when the first argument is absent or an option; None demands one.
        choose_data: ``data`` is a base class, and recipes name the subclass (``data: {class_path:, init_args:}``).
        links: Attributes of the data module that go into the model's constructor, such as
            ``{"data.num_classes": "model.num_classes"}``.
        aliases: Options under other names, ``{"--model.context": "--data.window"}``: the first is read as the second.
        argv: Arguments instead of the process's own.
        configs: Folder that holds ``<domain>/<recipe>.yaml``.
        folder: Folder of the recipes in ``configs`` instead of ``<domain>``, for a domain's second training command.

    Raises:
        SystemExit: With code 2 after a user's mistake, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = f"python -m {domain}.{command}"
    with exit_codes():
        recipes = {path.stem: path for path in sorted((configs / (folder or domain)).glob("*.yaml"))}
        if arguments[:1] in (["-h"], ["--help"]) or (not arguments and default_recipe is None):
            print(_overview(program, recipes, default_recipe))
            return
        recipe, stage, options = _split(arguments, recipes, default_recipe, program)
        for name, meant in (aliases or {}).items():
            options = [re.sub(rf"^{re.escape(name)}(?==|$)", meant, option) for option in options]
        from core.training.quiet import quiet
        from core.training.recipe import RUNS, RecipeCLI

        with quiet():
            cli = RecipeCLI(
                title=f"{domain} {recipe}",
                recipe=recipes[recipe],
                root=RUNS / (folder or domain) / recipe,
                stage=stage,
                options=options,
                command=shlex.join([*program.split(), *arguments]),
                usage=f"{program} {recipe} {stage} [options]",
                module=resolve(module),
                data=resolve(data),
                choose_data=choose_data,
                links=links or {},
            )
            cli.execute()


def run(function: Callable[..., Any], argv: Sequence[str] | None = None, optional: str | None = None) -> None:
    """Run one typed function as a command: parameters without default are positionals, the others options.

    A positional ``list[T]`` takes one or more arguments.

    Args:
        function: The function; its signature and docstring make the help. What it returns is dropped.
        argv: Arguments instead of the process's own.
        optional: Name of a parameter with a default that is a positional nonetheless, which may be left out.

    Raises:
        SystemExit: With code 2 after a user's mistake, 130 after Ctrl-C.
    """
    from jsonargparse import ArgumentParser

    keep_freed_memory()
    with exit_codes():
        parser = ArgumentParser(prog=_program(function), exit_on_error=False)
        parser.add_function_arguments(function, as_positional=True, fail_untyped=True)
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            if parameter.default is parameter.empty and get_origin(parameter.annotation) is list:
                _take_several(parser, name, get_args(parameter.annotation)[0])
            if name == optional:
                _take_or_leave(parser, name, parameter.annotation, parameter.default)
        arguments = list(sys.argv[1:] if argv is None else argv)
        config = parse(parser, arguments)
        function(**parser.instantiate(config).as_dict())


def _take_several(parser: Any, name: str, kind: type) -> None:
    """Let a positional take one or more arguments, each of type ``kind``."""
    action = next(action for action in parser._actions if action.dest == name)
    action.container._remove_action(action)
    parser.add_argument(name, nargs="+", type=kind, help=action.help)


def _take_or_leave(parser: Any, name: str, kind: Any, default: Any) -> None:
    """Turn an option into a positional that may be left out."""
    action = next(action for action in parser._actions if action.dest == name)
    action.container._remove_action(action)
    for option in action.option_strings:
        del parser._option_string_actions[option]
    parser.add_argument(name, nargs="?", type=kind, default=default, help=action.help)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a user's mistake into one line and exit code 2, and Ctrl-C into 130."""
    try:
        yield
    except UserError as error:
        _let_the_first_speak()
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def parse(parser: Any, arguments: Sequence[str]) -> Any:
    """Parse with a jsonargparse parser made with ``exit_on_error=False``; --top-k is taken for --top_k.

    Raises:
        UserError: In one line, with the option that may have been meant.
    """
    from argparse import ArgumentError

    try:
        return parser.parse_args(_underscored(arguments, option_names(parser)))
    except ArgumentError as error:
        raise UserError(explain(str(error), option_names(parser))) from None


def _underscored(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Spell options that are written with dashes within, as is the custom elsewhere, as they are called here."""
    spelt = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        called = "--" + name[2:].replace("-", "_")
        spelt.append(called + equals + value if name[:2] == "--" and called in options else argument)
    return spelt


def _let_the_first_speak() -> None:
    """Wait in all processes of a job but the first, which mostly made the same mistake and says so.

    Its end makes the launcher end the others; of a mistake that only this process made the user hears a little later.
    """
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))
    if all(rank == "0" for rank in ranks):
        return
    launcher, end = os.getppid(), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if os.getppid() != launcher:
            raise SystemExit(2)
        time.sleep(0.05)


def option_names(parser: Any) -> list[str]:
    """Return the long options of a parser and of its subcommands."""
    names = [name for name in parser._option_string_actions if name.startswith("--")]
    for action in parser._actions:
        for child in (getattr(action, "_name_parser_map", None) or {}).values():
            names += option_names(child)
    return sorted({name for name in names if not name.endswith("+")})


def _split(
    arguments: Sequence[str], recipes: Mapping[str, Path], default_recipe: str | None, program: str
) -> tuple[str, str, list[str]]:
    """Split the command line into recipe, stage and options."""
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        recipe = rest.pop(0)
    elif default_recipe is not None:
        recipe = default_recipe
    else:
        raise UserError(f"the first argument is the recipe, got {rest[0]}; recipes: {', '.join(recipes)}")
    if recipe not in recipes:
        raise UserError(f"unknown recipe {recipe!r}{_near(recipe, list(recipes))}; recipes: {', '.join(recipes)}")
    stage = "fit"
    if rest and not rest[0].startswith("-"):
        stage = rest.pop(0)
        if stage not in STAGES:
            raise UserError(
                f"unknown stage {stage!r}{_near(stage, STAGES)}; {program} {recipe} takes {', '.join(STAGES)}"
            )
    return recipe, stage, rest


def _near(word: str, known: Sequence[str]) -> str:
    hits = difflib.get_close_matches(word, known, n=2)
    return f" (did you mean {' or '.join(hits)}?)" if hits else ""


def _overview(program: str, recipes: Mapping[str, Path], default_recipe: str | None) -> str:
    width = max((len(name) for name in recipes), default=0)
    lines = [f"  {name:<{width}}  {_first_comment(path)}".rstrip() for name, path in recipes.items()]
    first = f"[RECIPE={default_recipe}]" if default_recipe else "RECIPE"
    return "\n".join(
        [
            f"usage: {program} {first} [{'|'.join(STAGES)}] [options]",
            "",
            "recipes:",
            *lines,
            "",
            f"{program} RECIPE --help lists every option with the recipe's values.",
        ]
    )


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _program(function: Callable[..., Any]) -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec is not None else function.__name__
