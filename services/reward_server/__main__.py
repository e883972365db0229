"""`python -m services.reward_server`: parse flags and settings, then serve."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turnwise.cli import Parser, printable
from turnwise.errors import TurnwiseError

if TYPE_CHECKING:
    from services.reward_server.settings import RewardServerSettings

SECTION = "reward_server"
# Option -> key of the settings, and what it says; everything else is in file or environment.
FLAGS = {
    "--model": (f"{SECTION}.model_path", "DIR", "the policy: a transformers checkpoint"),
    "--reference-model": (f"{SECTION}.reference_model_path", "DIR", "a frozen model beside it"),
    "--engine": (f"{SECTION}.engine", "NAME", "torch, vllm or fake (default: torch)"),
    "--dtype": (f"{SECTION}.dtype", "NAME", "auto, float32, bfloat16 or float16"),
    "--device": (f"{SECTION}.device", "NAME", "auto, cpu or cuda"),
    "--host": (f"{SECTION}.host", "HOST", "where to listen (default: 127.0.0.1)"),
    "--port": (f"{SECTION}.port", "PORT", "gRPC (default: 50051; 0 takes a free one)"),
    "--http-port": (f"{SECTION}.http_port", "PORT", "HTTP (default: 8081; 0 takes a free one)"),
    "--weights-root": ("weights_root", "DIR", "holds the published versions"),
    "--run": ("run", "NAME", "the run whose weights are watched in Redis"),
    "--log-level": ("log_level", "NAME", "debug, info, warning or error"),
    "--log-format": ("log_format", "NAME", "text or json"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 after a drain, 2 when the server cannot serve."""
    try:
        settings = load_from(make_parser().parse_args(argv))
        from services.reward_server.server import run  # noqa: PLC0415  gRPC, FastAPI load here

        run(settings)
    except SystemExit:  # --help has printed
        return 0
    except TurnwiseError as error:
        print(f"reward_server: error: {printable(str(error))}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    about = "Score every turn of an LLM agent's rollouts, over gRPC and REST."
    parser: argparse.ArgumentParser = Parser(prog="reward_server", description=about)
    for option, (_, metavar, text) in FLAGS.items():
        parser.add_argument(option, metavar=metavar, help=text)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings; otherwise $TURNWISE_CONFIG, then ./turnwise.toml where it exists",
    )
    return parser


def load_from(args: argparse.Namespace) -> "RewardServerSettings":
    """Load the settings, flags first, and set up the log."""
    from services.reward_server.settings import RewardServerSettings  # noqa: PLC0415
    from turnwise.logs import setup_logging  # noqa: PLC0415
    from turnwise.settings import load_settings, secret_values  # noqa: PLC0415

    given = {option: getattr(args, option[2:].replace("-", "_")) for option in FLAGS}
    flags = {FLAGS[option][0]: (option, value) for option, value in given.items() if value}
    settings, _ = load_settings(RewardServerSettings, args.config, os.environ, flags)
    setup_logging(settings.log_level, settings.log_format, secret_values(settings))
    return settings


if __name__ == "__main__":
    sys.exit(main())
