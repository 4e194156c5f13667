# SPDX-License-Identifier: Apache-2.0
"""The command `expertyard`: finds the subcommand, and turns every expected error into a sentence.

Exit codes: 0 done, 1 what the subcommand says, 2 an error, 130 interrupted. Each subcommand is a
module of this folder with add_parser(subparsers) and run(arguments); it imports what it needs when
it runs, because `expertyard plan` answers in a tenth of a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from expertyard import __version__
from expertyard.cli import bench, doctor, pack, plan, run
from expertyard.errors import ExpertyardError

__all__ = ["build_parser", "main"]

EXAMPLES = """examples:
  expertyard run                                     the model that comes with Expertyard
  expertyard run ./Qwen3-30B-A3B --prompt "Dear all," --memory machine
  expertyard plan Mixtral-8x7B --memory cuda:0=24GiB,cpu=64GiB
  expertyard pack ./Qwen3-30B-A3B -o ./packed --format int4
  expertyard doctor
  expertyard bench --quick
each command has its own --help
"""
# package that a command may miss -> what to install
NEEDS = {
    "numpy": "numpy",
    "rich": "rich>=13",
    "safetensors": "safetensors>=0.5",
    "torch": "torch>=2.11",
    "transformers": "transformers>=5.7",
    "yaml": "pyyaml>=6",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertyard",
        description="Mixture-of-experts models bigger than your GPU: plans which expert lives "
        "where, and runs each on native CPU and CUDA kernels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"expertyard {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (run, plan, pack, doctor, bench):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = build_parser().parse_args(plan.joined(argv))
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()  # so that a closed pipe is noticed here
    except ExpertyardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in NEEDS:
            raise
        print(
            f"expertyard {arguments.command} needs {package}, which is not installed: "
            f"pip install '{NEEDS[package]}'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `expertyard plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return int(code)
