# SPDX-License-Identifier: Apache-2.0
"""`expertyard plan`: what would live where, without loading anything. Its flags and exit codes are
fixed.

0 planned; 1 findings (errors or warnings) under --strict; 2 an error: a sentence on stderr, nothing
on stdout. Imports what it needs when it needs it, because a plan should take a tenth of a second.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from expertyard.cli.target import Target, open_target
from expertyard.errors import ConfigError, ExpertyardError

if TYPE_CHECKING:
    from expertyard.plan import Plan, Request
    from expertyard.spec import ModelSpec

EXAMPLES = """examples:
  expertyard plan Mixtral-8x7B --memory cuda:0=24GiB,cpu=64GiB --format int4
  expertyard plan DeepSeek-V3 --rules rules.yaml --strict
  expertyard plan ./model -n "0:16;1:16" --json
  expertyard plan DeepSeek-V3 -ot "blk\\.[3-9]\\.ffn_.*_exps=CUDA0,exps=CPU" --export kt
  expertyard plan Kimi-K2 --memory cuda:0=24GiB,cpu=1TiB --format int4 --what-if "--context 131072"
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
        "--save",
        metavar="FILE",
        help="write the plan as JSON, for --plan and ExpertsConfig(plan=FILE)",
    )
    output.add_argument(
        "--export", metavar="KIND", help="print it in another grammar: kt, ord, ot or device_map"
    )
    output.add_argument(
        "--svg", metavar="FILE", help="draw devices and layers, experts by popularity"
    )
    output.add_argument(
        "--what-if", metavar="OPTIONS", help="compare with the plan that these options would give"
    )
    output.add_argument(
        "--strict", action="store_true", help="exit 1 if there are errors or warnings"
    )


def add_request_arguments(group: Any) -> None:
    """One argument per field of plan.Request; None where not given."""
    group.add_argument("--plan", metavar="FILE.json", help="a plan that --save wrote")
    group.add_argument("--rules", metavar="FILE.yaml", help="KTransformers rules; first match wins")
    group.add_argument(
        "--layers",
        "-n",
        metavar="ORD:NUM;...",
        help='layers per GPU, such as "0:16;1:16" or 16; the rest on the CPU',
    )
    group.add_argument(
        "--topology", metavar="FILE.yaml", help="mistral.rs' layer ranges and regexes"
    )
    group.add_argument(
        "-ot",
        "--override-tensor",
        metavar="REGEX=DEVICE,...",
        action="append",
        help="llama.cpp: GGUF names to devices, first match wins; repeatable",
    )
    group.add_argument(
        "--cpu-moe",
        dest="override_tensor",
        action="append_const",
        const="--cpu-moe",
        help="all routed experts on the CPU, as -ot would say it",
    )
    group.add_argument(
        "--n-cpu-moe",
        dest="override_tensor",
        action="append",
        type="--n-cpu-moe={}".format,
        metavar="N",
        help="routed experts of the first N layers on the CPU",
    )
    # without a word of its own it would read as `-n gl`
    group.add_argument("-ngl", "--n-gpu-layers", type=_no_ngl, help=argparse.SUPPRESS)
    group.add_argument(
        "--device-map", metavar="FILE.json|auto", help="accelerate's names to devices"
    )
    group.add_argument(
        "--gpu-experts",
        metavar="N|RATIO|IDS",
        help="experts of each layer on its GPU, the rest on the CPU",
    )
    group.add_argument(
        "--strategy", metavar="NAME", help="which go first: uniform, frequency, front, back, trace"
    )
    group.add_argument(
        "--profile", metavar="FILE", help="how often experts are read, or a routing trace"
    )
    group.add_argument(
        "--memory",
        metavar="DEV=SIZE,...",
        help="what may be used: cuda:0=24GiB,cpu=128GiB, or machine",
    )
    group.add_argument(
        "--mb-resrv-per-gpu", metavar="MIB", help="MiB kept free per GPU: N, N,N or 0=N,1=N"
    )
    group.add_argument(
        "--format", metavar="FORMAT", help="of the routed experts (default: the checkpoint's own)"
    )
    group.add_argument(
        "--dense-format", metavar="FORMAT", help="of everything else (default: the checkpoint's)"
    )
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


def _no_ngl(value: str) -> NoReturn:
    raise argparse.ArgumentTypeError(
        "leave it out: what no input places goes to the GPUs as far as there is room. For a number "
        "of layers say --layers, counted from the front"
    )


def build_request(args: argparse.Namespace) -> Request:
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
    """Plans and prints. Returns the exit code; on an error nothing is printed or written."""
    try:
        plan, text = _answer(args)
    except ExpertyardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # names from files may hold what is no text
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(text, str):
        print(text)
    else:
        print_rich(text)
    serious = any(finding.severity in ("error", "warning") for finding in plan.findings)
    return 1 if args.strict and serious else 0


def _answer(args: argparse.Namespace) -> tuple[Plan, Any]:
    """(the plan, what to print: text or a rich renderable). Files are written last."""
    if args.json and args.export:
        raise ConfigError("--json and --export both print; take one of them.")
    target = open_target(args.target)
    spec, request, plan = _planned(target, args)
    other = _planned(target, _what_if(args))[2] if args.what_if else None
    text: Any
    if args.export:
        from expertyard.plan.export import export

        text = export(plan, spec, args.export)
    elif args.json:
        data = plan.to_json()
        text = json.dumps({**data, "what_if": other.to_json()} if other else data, indent=1)
    elif other is not None:
        from expertyard.plan.compare import compare

        text = compare(plan, other)
    else:
        text = plan.table()
    if args.save:
        plan.save(args.save)
    if args.svg:
        _draw(args.svg, plan, request, spec)
    return plan, text


def _planned(target: Target, args: argparse.Namespace) -> tuple[ModelSpec, Request, Plan]:
    """What is planned, as asked, and the plan. Quantised weights keep their formats unless the
    arguments name others, as they do when the model is loaded.
    """
    from dataclasses import replace

    from expertyard.plan.make import make_plan

    request, spec, own = build_request(args), target.spec, target.own
    if own is None:
        return spec, request, make_plan(spec, request)
    if args.format is not None:
        own = replace(own, experts={})
    if args.dense_format is not None:
        own = replace(own, saved=None)
    if own.widest is not None:
        request = replace(request, format=own.widest)
    spec = own.in_spec(spec, request.dense_format)
    return spec, request, own.in_plan(make_plan(spec, request))


def _what_if(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with those of --what-if over them."""
    import shlex

    parser = _RaisingParser(prog="--what-if", add_help=False, allow_abbrev=False)
    add_request_arguments(parser)
    try:
        words = shlex.split(args.what_if)
    except ValueError as error:
        raise ConfigError(f"--what-if: {error}.") from None
    changed = {k: v for k, v in vars(parser.parse_args(words)).items() if v is not None}
    if not changed:
        raise ConfigError("--what-if: expected options such as '--memory cuda:0=48GiB,cpu=64GiB'.")
    return argparse.Namespace(**{**vars(args), **changed})


class _RaisingParser(argparse.ArgumentParser):
    """A parser whose usage errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"--what-if: {message}.")


def _draw(path: str, plan: Plan, request: Request, spec: ModelSpec) -> None:
    from pathlib import Path

    from expertyard.plan.svg import draw
    from expertyard.rules.profile import read_profile

    weights = read_profile(request.profile, spec).weights if request.profile is not None else None
    try:
        Path(path).write_text(draw(plan, weights), "utf-8", "backslashreplace")
    except OSError as error:
        raise ConfigError(f"--svg {path}: cannot be written ({error.strerror}).") from None


def print_rich(renderable: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(renderable, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """`plan` on its own; `expertyard plan` comes here too."""
    parser = argparse.ArgumentParser(
        prog="expertyard plan",
        description="Says where every layer and every expert of a model would live, and why.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(joined(argv)))


def joined(argv: Sequence[str] | None) -> list[str]:
    """The words of the command line, with what follows --what-if made its value.

    argparse would take `--what-if --cpu-moe` for two options.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for i in range(len(words) - 1):
        if words[i] == "--what-if":
            words[i : i + 2] = [f"--what-if={words[i + 1]}"]
            break
    return words
