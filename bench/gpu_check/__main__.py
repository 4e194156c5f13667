# SPDX-License-Identifier: Apache-2.0
"""The command line: which parts, for how long, and the sentence where there is no GPU."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .parts import PART_NAMES, PARTS
from .run import run_parts
from .state import State

RESULTS = Path(__file__).resolve().parents[1] / "results"
NO_GPU = 3


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("bench/gpu_check.sh", description="Checks and measures a GPU.")
    p.add_argument("--part", action="append", choices=PART_NAMES, metavar="PART",
                   help="only this part (may be given again)")  # fmt: skip
    p.add_argument("--again", action="append", choices=PART_NAMES, metavar="PART", default=[],
                   help="do this part although it is done")  # fmt: skip
    p.add_argument("--minutes", type=float, default=9.0, help="stop after about so long")
    p.add_argument("--out", type=Path, help="the JSON file (default bench/results/gpu-NAME.json)")
    p.add_argument("--list", action="store_true", help="names the parts and ends")
    return p


def why_no_gpu() -> str | None:
    """A sentence if nothing can be measured here."""
    try:
        import torch
    except ImportError:
        return "gpu_check: no torch in this interpreter; set PYTHON to one that has a CUDA build"
    if torch.version.cuda is None:
        return f"gpu_check: torch {torch.__version__} is a CPU build; a CUDA build is needed"
    if not torch.cuda.is_available():
        return "gpu_check: no usable NVIDIA GPU on this machine; nothing was run"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.list:
        for part in PARTS:
            print(f"{part.name:<24}{part.what}")
        return 0
    if options.minutes <= 0:
        print("gpu_check: --minutes: expected more than 0", file=sys.stderr)
        return 2
    if sentence := why_no_gpu():
        print(sentence, file=sys.stderr)
        return NO_GPU
    from .card import Card

    card = Card()
    out = options.out or RESULTS / f"gpu-{card.short_name}.json"
    state = State.load(out, card.facts())
    return run_parts(state, card, options.part or PART_NAMES, options.again, options.minutes * 60)


if __name__ == "__main__":
    sys.exit(main())
