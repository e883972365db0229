"""The `turnwise` command: parses arguments, runs one command, turns errors into one line.

Light: only the standard library is imported here; a command loads what it needs when it runs.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from turnwise import __version__, credit_command
from turnwise.errors import TurnwiseError, nearest


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are TurnwiseErrors that name the nearest valid word."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Every parser refuses what it does not know itself: only it can name the nearest option.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            hint = f"; the nearest is {nearest(name, self._option_string_actions)}"
            self.error(f"unknown argument {name}{hint if name.startswith('-') else ''}")
        return namespace, []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            problem = f"unknown {value}, not one of {', '.join(choices)}"
            raise argparse.ArgumentError(
                action, f"{problem}; the nearest is {nearest(value, choices)}"
            )

    def error(self, message: str) -> NoReturn:
        raise TurnwiseError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for an error, 130 for Ctrl-C, 141 when nobody reads stdout."""
    try:
        prepare_stdout()
        code = run(argv)
        print(end="", flush=True)
        return code
    except TurnwiseError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:  # stdout: drop its buffer, or Python complains again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        message = f"{error.filename or 'standard output'}: {error.strerror}"
    except MemoryError:
        message = "out of memory"
    except KeyboardInterrupt:
        return 130
    if sys.stderr is not None:  # closed by the caller; print would turn to stdout
        print(f"turnwise: error: {printable(message)}", file=sys.stderr)
    return 2


def prepare_stdout() -> None:
    """Make sure that stdout is open, takes any character, and is written to its last byte."""
    if sys.stdout is None:
        raise TurnwiseError("standard output is closed")
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal is no error
    raw: object = sys.stdout.buffer
    if isinstance(raw, io.RawIOBase):  # PYTHONUNBUFFERED: a short write would be dropped
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors)


def run(argv: Sequence[str] | None) -> int:
    """Parse the arguments, load the settings where a command has some, run the command."""
    try:
        args = make_parser().parse_args(argv)
    except SystemExit:  # --help and --version have printed what they print
        return 0
    if "config" in args:
        from turnwise.logs import setup_logging
        from turnwise.settings import Settings, load_settings, secret_values

        args.settings, args.sources = load_settings(Settings, args.config, os.environ)
        settings = args.settings
        setup_logging(settings.log_level, settings.log_format, secret_values(settings))
    code: int = args.run(args)
    return code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    about = "A reward for every turn of an LLM agent's rollout."
    parser: argparse.ArgumentParser = Parser(prog="turnwise", description=about)
    parser.set_defaults(run=run_nothing)
    parser.add_argument("--version", action="version", version=f"turnwise {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    credit_command.add_parser(commands)
    about = "Print the effective settings and where each comes from."
    config = commands.add_parser("config", help=about, description=about)
    config.add_argument("--json", action="store_true", help="print JSON instead of a table")
    config.set_defaults(run=run_config)
    about = "Print the version."
    version = commands.add_parser("version", help=about, description=about)
    version.set_defaults(run=run_version)
    for command in ("config", "credit"):
        commands.choices[command].add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="settings; otherwise $TURNWISE_CONFIG, then ./turnwise.toml where it exists",
        )
    return parser


def run_nothing(_args: argparse.Namespace) -> int:
    raise TurnwiseError("no command given; `turnwise --help` lists them")


def run_config(args: argparse.Namespace) -> int:
    from turnwise.settings import effective_values

    values = effective_values(args.settings)
    if args.json:
        rows = {key: {"value": values[key], "source": args.sources[key]} for key in values}
        print(json.dumps(rows, indent=2))
        return 0
    shown = {key: "not set" if value is None else str(value) for key, value in values.items()}
    key_width, value_width = max(map(len, shown)), max(map(len, shown.values()))
    for key, value in shown.items():
        print(printable(f"{key:{key_width}}  {value:{value_width}}  {args.sources[key]}"))
    return 0


def run_version(_args: argparse.Namespace) -> int:
    print(f"turnwise {__version__}")
    return 0


def printable(text: str) -> str:
    """Escape line breaks and control characters, so that a message stays one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
