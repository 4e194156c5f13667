# SPDX-License-Identifier: Apache-2.0
"""`expertyard bench`: our kernels beside this machine's limits and beside their peers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from expertyard.errors import ConfigError

EXAMPLES = """examples:
  expertyard bench --quick
  expertyard bench --shapes Qwen3-30B-A3B --tokens 1,1024 --json result.json
  EXPERTYARD_ISA=avx2 expertyard bench --peers none
"""
SHAPE = "Qwen3-30B-A3B"
TOKENS = "1,4,16,64,256,1024"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `bench` command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="kernels beside this machine's limits and beside their peers",
        description="Measures the expert kernels on this machine: as shares of its read bandwidth "
        "and of its arithmetic peak, taken in the same run, and against transformers' own experts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", metavar="NAME,...", default=SHAPE, help=f"layers, or all (default {SHAPE})")
    add("--formats", metavar="NAME,...", default="bf16", help="of the weights (default bf16)")
    add("--tokens", metavar="N,...", default=TOKENS, help=f"tokens of a call (default {TOKENS})")
    add("--routing", choices=["uniform", "zipf"], default="uniform", help="who gets the tokens")
    add("--threads", type=int, metavar="N", help="default: what torch uses, within the cgroup")
    add("--peers", metavar="NAME,...", help="hf_eager, hf_grouped_mm or none (default: both)")
    add("--quick", action="store_true", help="a second per line instead of four")
    add("--json", metavar="FILE", help="write the results there too")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Raises ConfigError for a name that is not known."""
    import torch
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from expertyard.bench.limits import summary
    from expertyard.bench.measure import Effort, measure
    from expertyard.bench.peers import PEERS
    from expertyard.bench.report import machine, to_json, to_table
    from expertyard.bench.shapes import SHAPES
    from expertyard.native import _C
    from expertyard.testing import DTYPE_OF_FORMAT

    everything = [name for name in SHAPES if name != "small"]
    shapes = everything if args.shapes == "all" else names("--shapes", args.shapes, SHAPES)
    formats = names("--formats", args.formats, DTYPE_OF_FORMAT)
    peers = () if args.peers == "none" else tuple(names("--peers", args.peers, PEERS, PEERS))
    try:
        tokens = tuple(int(n) for n in args.tokens.split(","))
        if min(tokens) < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--tokens: expected numbers such as 1,64,1024, got {args.tokens!r}"
        ) from None
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ConfigError(f"--json: there is no folder {Path(args.json).absolute().parent}")
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads: expected 1 or more, got {args.threads}")
        torch.set_num_threads(args.threads)
    try:
        import transformers  # noqa: F401
    except ImportError:
        if args.peers not in (None, "none"):
            raise ConfigError("--peers: transformers is not installed") from None
        peers = ()

    about = machine()
    threads = min(torch.get_num_threads(), _C.thread_limits()["usable"])
    limits = summary(threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{about['cpu']}, {threads} threads: reads {limits['read_gbps']:.1f} GB/s, "
        + ", ".join(
            f"{label} {limits[key]:.0f} GFLOP/s"
            for label, key in (("vdpbf16ps", "bf16_gflops"), ("FMA", "fma_gflops"))
            if limits[key]
        ),
        highlight=False,
    )
    effort = Effort(seconds=1.0, max_samples=20) if args.quick else Effort()
    results = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("making weights", total=None)
        for name in shapes:
            for format in formats:
                results += measure(
                    SHAPES[name],
                    format=format,
                    tokens=tokens,
                    routing=args.routing,
                    peers=peers,
                    effort=effort,
                    progress=lambda step: progress.update(task, description=step),
                )
    console.print(to_table(results), highlight=False)
    console.print(
        "of read: bytes of the chosen experts / time / read bandwidth; of peak: operations / time "
        "/ peak; of roof: the larger of the two ideal times / time. Medians, probes in between.",
        highlight=False,
    )
    if args.json:
        Path(args.json).write_text(json.dumps(to_json(results, limits, about), indent=1) + "\n")
    return 0


def names(flag: str, text: str | None, known: Any, default: tuple[str, ...] = ()) -> list[str]:
    """The comma-separated names of a flag, each of them known."""
    if text is None:
        return list(default)
    import difflib

    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{flag}: {name!r} is not known; {hint}")
    return chosen
