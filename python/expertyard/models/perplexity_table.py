# SPDX-License-Identifier: Apache-2.0
"""What each weight format costs in quality: the embedded model's perplexity in every format.

    python -m expertyard.models.perplexity_table [--bytes N] [--formats int4,int4-g32 ...]

prints the table of docs/checkpoints.md. Experts are 88 % of the model's weights; the rest stays
bfloat16. The text is held out from training; the reference is transformers in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FORMATS", "Row", "main", "rows"]

# those of docs/checkpoints.md; quantised ones are measured plain and with a search for scales
FORMATS = (
    "bf16", "fp8", "fp8-channel", "int8", "int8-g128", "int8-g32",
    "int4-g32-asym", "int4-g32", "int4-g64-asym", "int4-g64", "int4-g128-asym", "int4", "mxfp4",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model. bits: of a weight of the experts, scales included."""

    name: str
    search: bool
    bits: float
    perplexity: float
    bits_per_byte: float


def rows(formats: Sequence[str] = FORMATS, num_bytes: int | None = None) -> list[Row]:
    """The reference, then each format plain and searched, on the first num_bytes of the text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from expertyard import from_pretrained, verify
    from expertyard.models import tiny_moe
    from expertyard.models.perplexity import perplexity

    folder = tiny_moe()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (folder / "heldout.txt").read_bytes()[:num_bytes].decode("utf-8", "ignore")

    def measured(name: str, search: bool, bits: float, model: Any) -> Row:
        found = perplexity(model, text, tokenizer)
        return Row(name, search, bits, found.perplexity_per_byte, found.bits_per_byte)

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    table = [measured("float32 (transformers)", False, 32, reference)]
    config = reference.config
    weights = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts
    del reference
    for name in formats:
        for search in (False, True):
            if search and (name == "bf16" or name.startswith(("fp8", "int8"))):
                continue  # nothing to win: errors are far below what the text can show
            model = from_pretrained(folder, format=name, search=search, dtype=torch.bfloat16)
            bits = verify(model).layers[0].nbytes * 8 / weights
            table.append(measured(name, search, bits, model))
    return table


def markdown(table: Sequence[Row]) -> str:
    """The table as the documentation has it."""
    lines = ["| experts in | scales | bits a weight | perplexity a byte | more than float32 |"]
    lines.append("|--|--|--:|--:|--:|")
    for row in table:
        how = "" if row is table[0] or row.name == "bf16" else "searched" if row.search else "plain"
        more = f"{100 * (row.perplexity / table[0].perplexity - 1):+.2f} %"
        lines.append(
            f"| {row.name} | {how} | {row.bits:.3g} | {row.perplexity:.4f} | "
            f"{'' if row is table[0] else more} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m expertyard.models.perplexity_table")
    parser.add_argument("--bytes", type=int, help="of the held-out text (default: all, 64 KiB)")
    parser.add_argument("--formats", default=",".join(FORMATS), help="separated by commas")
    arguments = parser.parse_args(argv)
    print(markdown(rows(arguments.formats.split(","), arguments.bytes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
