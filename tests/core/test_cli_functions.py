"""Commands that are one typed function, and the wording of the parser's messages."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import core
from core.cli import run
from core.errors import UserError
from core.wording import explain


class Chosen:
    """What ``data.class_path`` names in the messages below."""

    def __init__(self, n: int, label: str) -> None:
        self.n, self.label = n, label


CHOSEN = (
    'Parser key "data":\n  Does not validate against any of the Union subtypes\n  Errors:\n'
    "    - Problem with given class_path 'chosen.Chosen':\n        {}\n    - Expected a <class 'NoneType'>\n"
    "  Given value type: <class 'dict'>\n  Given value: dict"
)


@pytest.mark.parametrize(("arguments", "said"), [(["hi"], "hi 1"), ([], "hello 1"), (["hi", "--times", "2"], "hi 2")])
def test_a_positional_that_may_be_left_out(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def say(word: str = "hello", times: int = 1) -> None:
        """Says it."""
        print(word, times)

    run(say, arguments, optional="word")
    assert capsys.readouterr().out.strip() == said


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (
            "Subcommand 'fit' does not accept option 'model.widht'",
            "unknown option --model.widht (did you mean --model.width",
        ),
        ("Parser key \"model.x\":\n  Expected a <class 'float'>. Got value: abc", "--model.x is 'abc'; wanted float"),
        ("something\n  else", "something else"),
        (CHOSEN.format("Option 'lab' is not accepted"), "unknown option --data.lab (did you mean --data.label?)"),
        (
            CHOSEN.format("Parser key \"n\":\n          Expected a <class 'int'>. Got value: x"),
            "--data.n is 'x'; wanted int",
        ),
        (
            'Parser key "data":\n    - Expected a dot import path string: Po\n  Given value: '
            "NestedArg(key='class_path', val='Po')",
            "--data.class_path is 'Po'; wanted a class",
        ),
    ],
)
def test_messages_of_the_parser_become_one_line(message: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chosen", SimpleNamespace(Chosen=Chosen))
    assert says in explain(message, ["--model.width", "--data.root"])


def greet(name: str, times: int = 1, *, loud: bool = False) -> None:
    """Greet someone.

    Args:
        name: Whom.
        times: How often.
        loud: In capitals.
    """
    if times < 1:
        raise UserError(f"times is {times}; wanted 1 or more")
    print(" ".join([name.upper() if loud else name] * times))


def test_run_takes_positionals_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    run(greet, ["ann", "--times", "2", "--loud", "true"])
    assert capsys.readouterr().out == "ANN ANN\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ann", "--tims", "2"], "unknown option --tims (did you mean --times?)"),
        (["ann", "--times", "two"], "--times is 'two'; wanted int"),
        (["ann", "--times", "0"], "times is 0; wanted 1 or more"),
        ([], "name"),
    ],
)
def test_run_has_the_same_errors(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(greet, arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_options_may_be_written_with_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    def count(num_clips: int = 1, note: str = "") -> None:
        """Counts."""
        print(num_clips, note)

    run(count, ["--num-clips", "3", "--note", "a-b"])
    run(count, ["--num-clips=4", "--note=--num-clips"])
    assert capsys.readouterr().out == "3 a-b\n4 --num-clips\n"


def test_a_workers_traceback_is_cut_from_the_message() -> None:
    pasted = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    assert str(UserError(pasted + "core.errors.UserError: cannot read a.png\n")) == "cannot read a.png"


def test_a_positional_list_takes_several_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    def gather(sizes: list[int], name: str = "x") -> None:
        """Gathers.

        Args:
            sizes: Some sizes.
            name: A name.
        """
        print(sizes, name)

    run(gather, ["1", "2", "--name", "y"])
    assert capsys.readouterr().out == "[1, 2] y\n"
    for argv, message in (([], "required: sizes"), (["1", "a"], "sizes")):
        with pytest.raises(SystemExit) as stop:
            run(gather, argv)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_only_the_first_process_words_a_mistake_of_all(tmp_path: Path) -> None:
    script = tmp_path / "mistake.py"
    script.write_text(
        "import os, sys\n"
        "from core import cli\n"
        "from core.errors import UserError\n"
        "cli.PATIENCE = float(sys.argv[1])\n"
        "with cli.exit_codes():\n"
        "    if os.environ['RANK'] in sys.argv[2:]:\n"
        "        raise UserError('no data in ' + os.environ['RANK'])\n"
    )
    # A launcher that ends the others when one has failed, as torchrun does.
    launcher = (
        "import os, subprocess, sys, time\n"
        "jobs = [subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | {'RANK': str(rank)})\n"
        "        for rank in range(3)]\n"
        "while not any(job.poll() for job in jobs):\n"
        "    time.sleep(0.05)\n"
        "for job in jobs:\n"
        "    job.kill()\n"
    )

    def says(*arguments: str) -> str:
        command = [sys.executable, "-c", launcher, str(script), *arguments]
        place = os.environ | {"PYTHONPATH": str(Path(core.__file__).parents[1])}
        return subprocess.run(command, env=place, capture_output=True, text=True, timeout=120, check=True).stderr

    assert says("60", "0", "1", "2") == "error: no data in 0\n"
    assert says("0.2", "1") == "error: no data in 1\n"


def test_an_option_that_is_wanted_is_called_as_it_is_written() -> None:
    message = "the following arguments are required: test.data.root, sizes"
    assert explain(message, ["--data.root", "--data.window"]) == "required: --data.root, sizes; --help lists all"
