# SPDX-License-Identifier: Apache-2.0
"""`expertyard plan`: what would live where, without loading anything. Its flags and exit codes are
fixed.

0 planned; 1 findings (errors or warnings) under --strict; 2 an error: a sentence on stderr, nothing
on stdout. Imports what it needs when it needs it, because a plan should take a tenth of a second.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from expertyard.errors import ConfigError, ExpertyardError

EXAMPLES = """examples:
  expertyard plan Mixtral-8x7B --memory cuda:0=24GiB,cpu=64GiB --format int4
  expertyard plan DeepSeek-V3 --rules rules.yaml --strict
  expertyard plan ./model -n "0:16;1:16" --json
  expertyard plan Qwen3-30B-A3B --memory machine --save plan.json
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `plan` command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="what would live where, and why; loads nothing",
        description="Says where every layer and every expert of a model would live, in how many "
        "bytes, and why. Loads no weights and needs no GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments, on any parser."""
    add = parser.add_argument
    add(
        "target",
        metavar="TARGET",
        help="a folder, a config.json, or a known model such as Mixtral-8x7B",
    )
    request = parser.add_argument_group("what goes where")
    add_request_arguments(request)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print the plan as JSON (docs/placement.md)"
    )
    output.add_argument(
        "--save", metavar="FILE", help="write the plan as JSON, for ExpertsConfig(plan=FILE)"
    )
    output.add_argument(
        "--strict", action="store_true", help="exit 1 if there are errors or warnings"
    )


def add_request_arguments(group: Any) -> None:
    """One argument per field of plan.Request; None where not given."""
    group.add_argument("--rules", metavar="FILE.yaml", help="KTransformers rules; first match wins")
    group.add_argument(
        "--layers",
        "-n",
        metavar="ORD:NUM;...",
        help='layers per GPU, such as "0:16;1:16" or 16; the rest on the CPU',
    )
    group.add_argument(
        "--memory",
        metavar="DEV=SIZE,...",
        help="what may be used: cuda:0=24GiB,cpu=128GiB, or machine",
    )
    group.add_argument(
        "--mb-resrv-per-gpu", metavar="MIB", help="MiB kept free per GPU: N, N,N or 0=N,1=N"
    )
    group.add_argument("--format", metavar="FORMAT", help="of the routed experts (default bf16)")
    group.add_argument("--dense-format", metavar="FORMAT", help="of everything else (default bf16)")
    group.add_argument(
        "--context", type=int, metavar="TOKENS", help="tokens the KV cache holds (default 4096)"
    )
    group.add_argument(
        "--batch", type=int, metavar="N", help="sequences the KV cache holds (default 1)"
    )
    group.add_argument(
        "--bandwidth", metavar="DEV=SPEED,...", help="bytes/s a device reads: cuda:0=900GB,cpu=60GB"
    )
    group.add_argument(
        "--priority", metavar="DEV,...", help="GPUs in the order in which they are filled"
    )


def build_request(args: argparse.Namespace) -> Any:
    """plan.Request of parsed arguments. `--memory machine` asks the machine."""
    from dataclasses import fields

    from expertyard.plan.request import Request

    values = {f.name: getattr(args, f.name, None) for f in fields(Request)}
    values = {name: value for name, value in values.items() if value is not None}
    if values.get("memory") == "machine":
        values["memory"] = machine_memory()
    return Request.from_dict(values)


def machine_memory() -> dict[str, int]:
    """Free bytes of this machine's devices."""
    from importlib import import_module

    try:
        found: dict[str, int] = import_module("expertyard.devices").machine_memory()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--memory machine: this machine cannot be asked ({error}).") from None
    return found


def run(args: argparse.Namespace) -> int:
    """Plans and prints. Returns the exit code."""
    try:
        from expertyard.plan.make import make_plan
        from expertyard.spec import resolve_target

        request = build_request(args)
        plan = make_plan(resolve_target(args.target), request)
        if args.save:
            plan.save(args.save)
    except ExpertyardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(plan.to_json(), indent=1))
    else:
        print_table(plan)
    serious = any(finding.severity in ("error", "warning") for finding in plan.findings)
    return 1 if args.strict and serious else 0


def print_table(plan: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(plan.table(), highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """`plan` on its own; `expertyard plan` comes here too."""
    parser = argparse.ArgumentParser(
        prog="expertyard plan",
        description="Says where every layer and every expert of a model would live, and why.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
