"""`turnwise credit`: advantages for recorded scores, as JSON or as a table."""

import argparse
import os
import shutil
import sys

from turnwise.errors import InvalidInput

FLAGS = {
    "preset": "paper, paper_v1 or grpo: sets all options below that are not given",
    "gain": "log_prob or prob",
    "norm": "separate, joint, scaled_separate, raw, per_turn_index, outcome_only or gain_only",
    "gamma": "discount of later turns, from 0 to 1",
    "outcome_weight": "weight of the outcomes after normalisation",
    "gain_weight": "weight of the gains after normalisation",
}
NUMBERS = ("gamma", "outcome_weight", "gain_weight")
COLORS = ("auto", "always", "never")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its flags; `run` checks their values, to answer in one line."""
    about = "Turn answer scores and outcomes into one advantage per turn."
    parser = subparsers.add_parser("credit", help=about, description=about)
    parser.add_argument("file", help="JSON or a recorded group; - reads standard input")
    for name, text in FLAGS.items():
        parser.add_argument(_flag(name), metavar="VALUE", help=text)
    parser.add_argument("--table", action="store_true", help="print a table instead of JSON")
    parser.add_argument("--color", metavar="WHEN", default="auto", help=", ".join(COLORS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, compute, and only then print."""
    # Imported here so that `--help` needs no numpy.
    from turnwise import credit_file, credit_table
    from turnwise.credit import PRESETS, credit
    from turnwise.errors import require_one_of

    require_one_of("--color", args.color, COLORS)
    batch, in_file = credit_file.parse(credit_file.read_bytes(args.file))
    # Each layer overrides the one before: settings, file, command line.
    options = PRESETS["paper"]
    for changes, place in (
        (args.settings.credit.model_dump(exclude_none=True), "credit.{}".format),
        (in_file, "options.{}".format),
        (_given(args), _flag),
    ):
        options = credit_file.change_options(options, changes, place)
    result = credit(batch, options)
    if args.table:
        look = credit_table.Look(shutil.get_terminal_size().columns, *_terminal(args.color))
        lines = credit_table.table(batch, result, options, look)
        sys.stdout.writelines(f"{line}\n" for line in lines)
    else:
        sys.stdout.write(credit_file.reply(batch, result, options).decode())
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(args: argparse.Namespace) -> dict[str, str | float]:
    """Return the options that stand on the command line."""
    given: dict[str, str | float] = {}
    for name in FLAGS:
        value = getattr(args, name)
        if value is None:
            continue
        try:
            given[name] = float(value) if name in NUMBERS else value
        except ValueError as error:
            raise InvalidInput(_flag(name), f"must be a number, got {value!r}") from error
    return given


def _terminal(color: str) -> tuple[bool, bool]:
    """Return whether standard output shows colours, and block characters."""
    auto = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    try:
        "█▐▌│".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return color == "always" or (color == "auto" and auto), False
    return color == "always" or (color == "auto" and auto), True
