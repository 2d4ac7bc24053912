"""The `otdd` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command of `otdd`; heavy imports happen inside the command."""
    parser = argparse.ArgumentParser(prog="otdd", description="Dataset distillation.")
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="versions, backends and why some are missing")
    env.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if arguments.command == "env":
        from otdd import environment

        environment.show(arguments.json)
