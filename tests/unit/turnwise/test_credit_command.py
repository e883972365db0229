"""`turnwise credit` from the outside: golden numbers, options, colours, one-line errors."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from turnwise import credit_command
from turnwise.credit import PRESETS, CreditOptions, Norm
from turnwise.errors import InvalidInput
from turnwise.scores import GainKind
from turnwise.settings import CreditSettings, Settings

GOLDEN = (
    '{"groups":[{"rollouts":[{"scores":[-2,-1,-0.2],"outcome":1.0},'
    '{"scores":[-2,-2.1,-1.5],"outcome":0.4}]}]'
)


def execute(*argv: str, settings: CreditSettings | None = None) -> int:
    parser = argparse.ArgumentParser()
    credit_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["credit", *argv])
    args.settings = Settings(credit=settings or CreditSettings())
    return credit_command.run(args)


@pytest.fixture
def golden(tmp_path: Path) -> str:
    path = tmp_path / "golden.json"
    path.write_text(GOLDEN + "}")
    return str(path)


def advantages(text: str) -> list[list[float]]:
    return [rollout["advantages"] for rollout in json.loads(text)["groups"][0]["rollouts"]]


def test_standard_input_gives_the_golden_advantages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((GOLDEN + "}").encode())))

    assert execute("-") == 0

    first, second = advantages(capsys.readouterr().out)
    assert first == pytest.approx([2.567852, 1.542716, 0.999997], abs=1e-6)
    assert second == pytest.approx([-2.567852, -0.939694, -0.999997], abs=1e-6)


def options_of(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)["options"]


def test_the_command_line_overrides_the_file_and_the_file_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.json"
    path.write_text(GOLDEN + ', "options": {"preset": "paper_v1", "gamma": 0.9}}')

    execute(str(path))
    in_file = options_of(capsys)
    assert (in_file["gain"], in_file["norm"], in_file["gamma"]) == ("prob", "joint", 0.9)

    execute(str(path), "--norm", "raw", "--gamma", "0.5", "--outcome-weight", "2")
    shown = options_of(capsys)
    assert (shown["gain"], shown["norm"], shown["gamma"]) == ("prob", "raw", 0.5)
    assert (shown["outcome_weight"], shown["gain_weight"]) == (2.0, 1.0)

    execute(str(path), settings=CreditSettings(preset="grpo", gain="log_prob", gamma=0.1))
    assert options_of(capsys) == in_file

    path.write_text(GOLDEN + ', "options": {"gamma": 0.9}}')
    execute(str(path), settings=CreditSettings(preset="grpo", gain="prob", gamma=0.1))
    shown = options_of(capsys)
    assert (shown["gain"], shown["norm"], shown["gamma"]) == ("prob", "outcome_only", 0.9)

    execute(str(path), "--preset", "paper", "--gain-weight", "0.5")
    assert CreditOptions(**options_of(capsys)) == CreditOptions(gain_weight=0.5)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--norm", "seperate"], r"^--norm: unknown name 'seperate': .*nearest is 'separate'"),
        (["--gain", "logprob"], r"^--gain: .*nearest is 'log_prob'"),
        (["--preset", "papre"], r"^--preset: .*nearest is 'paper'"),
        (["--gamma", "-0.5"], r"^--gamma: must be a finite number from 0 to 1, got -0\.5"),
        (["--gamma", "nan"], r"^--gamma: "),
        (["--gamma", "half"], r"^--gamma: must be a number, got 'half'"),
        (["--gain-weight", "1e308"], r"^--gain-weight: "),
        (["--color", "alway"], r"^--color: .*nearest is 'always'"),
    ],
)
def test_a_wrong_flag_is_named_and_nothing_is_printed(
    golden: str, flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidInput, match=problem):
        execute(golden, *flags)
    assert capsys.readouterr().out == ""


def test_a_wrong_option_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text(GOLDEN + ', "options": {"gamma": -1}}')

    with pytest.raises(InvalidInput, match=r"^options\.gamma: "):
        execute(str(path), "--gamma", "1")


def test_help_names_every_option_value() -> None:
    names = (*get_args(GainKind), *get_args(Norm), *PRESETS)

    told = " ".join(credit_command.FLAGS.values())
    assert [name for name in names if name not in told] == []
    assert list(credit_command.FLAGS) == ["preset", *CreditOptions.__struct_fields__]


def test_a_table_is_plain_unless_colour_is_asked_for(
    golden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(golden, "--table")
    assert "\x1b" not in capsys.readouterr().out
    execute(golden, "--table", "--color", "always")
    assert "\x1b[32m" in capsys.readouterr().out


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_colour_unless_no_color_is_set(
    golden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        execute(golden, "--table")
        shown[no_color] = terminal.getvalue()

    assert "\x1b[32m" in shown[""]
    assert "\x1b" not in shown["1"]


def test_an_ascii_terminal_gets_ascii(golden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)

    execute(golden, "--table")

    stdout.flush()
    assert b"|####" in stdout.buffer.getvalue()


def test_the_parser_needs_no_numpy() -> None:
    code = "import sys, turnwise.credit_command; sys.exit('numpy' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b'{"groups": []}', b"groups: is empty"),
        (b'{"groups": [{"rollouts": [{"scores": [-1, "x"], "outcome": 1}]}]}', b"scores[1]"),
        (b'{"groups": \xff', b"byte 11: is not UTF-8"),
        (b"\x85\xa2id", b"truncated"),
        (b" " * (12 * 2**20 + 1), b"standard input: is larger than the limit of 12 MiB"),
    ],
)
def test_a_bad_input_is_one_line_on_stderr_and_exit_code_2(data: bytes, place: bytes) -> None:
    command = [sys.executable, "-m", "turnwise", "credit", "-"]

    done = subprocess.run(command, input=data, capture_output=True, check=False)

    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"turnwise: error: ")
    assert place in done.stderr
    assert done.stderr.count(b"\n") == 1
