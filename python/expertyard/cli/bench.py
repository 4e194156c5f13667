# SPDX-License-Identifier: Apache-2.0
"""`expertyard bench`: our kernels beside this machine's limits and beside their peers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from expertyard.errors import ConfigError

EXAMPLES = """examples:
  expertyard bench --quick
  expertyard bench --shapes qwen3,mixtral --formats int4 --tokens 1,1024 --json result.json
  expertyard bench --shapes all --routing uniform,zipf --svg result.svg
  EXPERTYARD_ISA=avx2 expertyard bench --formats bf16 --peers none

A name may be shortened to its first letters: qwen3, gpt-oss.
"""
SHAPE = "Qwen3-30B-A3B"
FORMATS = "bf16,int8,int4,fp8,mxfp4"
TOKENS = "1,4,16,64,256,1024"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `bench` command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="kernels beside this machine's limits and beside their peers",
        description="Measures the expert kernels on this machine: as shares of its read bandwidth "
        "and of its arithmetic peak, taken in the same run, and against others' kernels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", metavar="NAME,...", default=SHAPE, help=f"layers, or all (default {SHAPE})")
    add("--formats", metavar="NAME,...", default=FORMATS, help=f"(default {FORMATS})")
    add("--modes", metavar="NAME,...", default="exact,fast", help="exact, fast (default both)")
    add("--tokens", metavar="N,...", default=TOKENS, help=f"tokens of a call (default {TOKENS})")
    add("--routing", metavar="NAME,...", default="uniform", help="uniform (default), zipf")
    add("--threads", type=int, metavar="N", help="default: what torch uses, within the cgroup")
    add("--peers", metavar="NAME,...", help="or none (default: all that are installed)")
    add("--quick", action="store_true", help="a third of the time, and rougher")
    add("--json", metavar="FILE", help="write the results there too")
    add("--svg", metavar="FILE", help="draw them there: share of the roofline over tokens")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Raises ConfigError for a name that is not known."""
    import torch
    from rich.console import Console

    from expertyard.bench.layer import make_layer
    from expertyard.bench.limits import Limits
    from expertyard.bench.measure import QUICK, ROUTINGS, Effort, Plan, Result, measure
    from expertyard.bench.peers import PEERS
    from expertyard.bench.plot import draw
    from expertyard.bench.report import LEGEND, busy, machine, stolen_seconds, to_json, to_table
    from expertyard.bench.shapes import SHAPES
    from expertyard.formats import get_format
    from expertyard.modes import MODES
    from expertyard.native import _C

    everything = [name for name in SHAPES if name != "small"]
    shapes = everything if args.shapes == "all" else names("--shapes", args.shapes, SHAPES)
    formats = [get_format(name.strip()).name for name in args.formats.split(",")]
    peers = tuple(PEERS) if args.peers is None else ()
    if args.peers not in (None, "none"):
        peers = tuple(names("--peers", args.peers, PEERS))
    plan = Plan(
        format="",
        modes=tuple(names("--modes", args.modes, MODES)),
        tokens=counts("--tokens", args.tokens),
        routings=tuple(names("--routing", args.routing, ROUTINGS)),
        peers=peers,
        effort=QUICK if args.quick else Effort(),
    )
    for flag, file in (("--json", args.json), ("--svg", args.svg)):
        if file and not Path(file).absolute().parent.is_dir():
            raise ConfigError(f"{flag}: there is no folder {Path(file).absolute().parent}")
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads: expected 1 or more, got {args.threads}")
        torch.set_num_threads(args.threads)

    about = machine()
    threads = min(torch.get_num_threads(), _C.thread_limits()["usable"])
    console = Console(width=None if sys.stdout.isatty() else 160)
    if warning := busy(threads):
        Console(stderr=True).print(f"Warning: {warning}.", style="yellow", highlight=False)
    probes = Limits(threads)
    limits = probes.summary()
    about["dispatch_us"] = probes.dispatch_us()
    console.print(
        f"{about_limits(about['cpu'], threads, limits)}, dispatch {about['dispatch_us']:.2f} us",
        highlight=False,
    )
    stolen = stolen_seconds()
    results: list[Result] = []
    absent: dict[str, str] = {}
    with progress_line() as progress:
        for shape in shapes:
            progress(f"{shape}: making weights")
            layer = make_layer(SHAPES[shape])
            for format in formats:
                found, missing = measure(
                    layer, Plan(**{**vars(plan), "format": format}), probes, progress
                )
                results += found
                about["stolen_cpu_seconds"] = stolen_seconds() - stolen
                absent |= {name: why for name, why in missing.items() if name not in absent}
                if found:
                    note = f" ({SHAPES[shape].note})" if SHAPES[shape].note else ""
                    console.print(to_table(found, f"\n{shape}{note}, {format}"), highlight=False)
                for name, why in missing.items():
                    console.print(f"{name}: not measured, {why}", style="dim", highlight=False)
                # after each format: a run that is stopped keeps what it has
                if args.json:
                    text = json.dumps(to_json(results, limits, about, absent), indent=1)
                    Path(args.json).write_text(text + "\n")
                if args.svg:
                    title = f"{about['cpu']}, {threads} threads: share of the roofline"
                    Path(args.svg).write_text(draw([r.to_json() for r in results], title))
    if not results:
        raise ConfigError(
            f"--formats, --modes: nothing to measure: {args.formats} has no mode {args.modes}"
        )
    console.print("\n" + LEGEND, highlight=False)
    return 0


def about_limits(cpu: str, threads: int, limits: dict[str, float | None]) -> str:
    peaks = (
        ("bf16 dots", "bf16_gflops", "GFLOP/s"),
        ("8-bit dots", "int8_gops", "GOP/s"),
        ("FMA", "fma_gflops", "GFLOP/s"),
    )
    return f"{cpu}, {threads} threads: reads {limits['read_gbps']:.1f} GB/s, " + ", ".join(
        f"{label} {limits[key]:.0f} {unit}" for label, key, unit in peaks if limits[key]
    )


def progress_line() -> Any:
    """Context manager: a function that says what is being measured now, on standard error."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    @contextmanager
    def lines() -> Any:
        yield lambda step: print(step, file=sys.stderr, flush=True)

    @contextmanager
    def spinner() -> Any:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        # one frame a second: what it draws takes time from what is measured
        with Progress(
            *columns, console=Console(stderr=True), transient=True, refresh_per_second=1
        ) as progress:
            task = progress.add_task("", total=None)
            yield lambda step: progress.update(task, description=step)

    return (spinner if sys.stderr.isatty() else lines)()


def counts(flag: str, text: str) -> tuple[int, ...]:
    """Numbers of tokens, each 1 or more."""
    try:
        found = tuple(int(n) for n in text.split(","))
        if min(found) < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{flag}: expected numbers such as 1,64,1024, got {text!r}") from None
    return tuple(dict.fromkeys(found))


def names(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """The comma-separated names of a flag, each of them known, or the beginning of one alone."""
    import difflib

    known = list(known)
    chosen = []
    for name in (part.strip() for part in text.split(",")):
        begins = [k for k in known if k.lower().startswith(name.lower())] if name else []
        if name in known or len(begins) == 1:
            chosen.append(name if name in known else begins[0])
            continue
        near = begins or difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"{flag}: {name!r} is not known; {hint}")
    return list(dict.fromkeys(chosen))
