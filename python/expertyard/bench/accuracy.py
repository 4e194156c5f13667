# SPDX-License-Identifier: Apache-2.0
"""docs/accuracy.md: what formats and modes cost in exactness, and what that costs a model.

  python -m expertyard.bench.accuracy docs/accuracy.md

Errors of one layer against float64, on the shapes of the benchmark; perplexity of the model that
comes with the package, its experts packed in each format. Nothing here measures speed.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import tiny_moe
from ..models.perplexity import perplexity
from ..modes import MODES, has_fast
from ..native import _C
from ..ops import moe_experts
from ..packing import ExpertPacker
from ..testing import calc_diff
from .layer import Call, Layer, make_layer
from .measure import own_variants
from .shapes import SHAPES, Shape

FORMATS = (
    "bf16",
    *("int8", "int8-g128", "int8-g64", "int8-g32"),
    *("int4", "int4-g64", "int4-g32", "int4-g128-asym", "int4-g64-asym", "int4-g32-asym"),
    *("fp8", "fp8-channel", "mxfp4"),
)
OUTLIERS, TIMES = 8, 30  # channels of the hidden states that are larger, and how much
TEXT_BYTES = 16 << 10
_TOKENS = 16
_DRAWN = 1 << 18  # values of a matrix that are drawn: enough for two digits


@dataclass(frozen=True)
class Errors:
    """Relative L2 errors against float64 of one format of one shape; None: no such mode.

    weights         of the format alone: its weights computed in float64, against those it was
                    made from
    exact, fast     of the kernel alone, on the weights as the format keeps them
    fast_outliers   the same, with a few channels of the hidden states 30 times as large
    all_exact, all_fast  of both: the kernel against the weights that the format was made from
    """

    weights: float
    exact: float
    fast: float | None
    exact_outliers: float
    fast_outliers: float | None
    all_exact: float
    all_fast: float | None


def layer_for(shape: Shape) -> Layer:
    """A layer of this shape that has only as many experts as one token takes."""
    return make_layer(replace(shape, num_experts=shape.top_k), drawn=_DRAWN)


def errors_of(layer: Layer, format: str) -> Errors:
    """Deterministic but for the order in which a kernel sums."""
    calls = {outliers: _call(layer.shape, outliers) for outliers in (False, True)}
    drawn, kept = layer.drawn_rows(), layer.drawn_rows(format)
    plain = layer.reference(calls[False], drawn)
    own = {outliers: layer.reference(call, kept) for outliers, call in calls.items()}
    packed = {v.mode: v.run for v in own_variants(layer, format) if v.experts.layout == "blocks"}
    layer.forget()

    def error(mode: str, outliers: bool, expected: Tensor) -> float | None:
        if mode not in packed:
            return None
        call = calls[outliers]
        out = packed[mode](call.hidden_states, call.topk_ids, call.topk_weights)
        return calc_diff(out, expected)

    return Errors(
        weights=calc_diff(own[False], plain),
        exact=error("exact", False, own[False]) or 0.0,
        fast=error("fast", False, own[False]),
        exact_outliers=error("exact", True, own[True]) or 0.0,
        fast_outliers=error("fast", True, own[True]),
        all_exact=error("exact", False, plain) or 0.0,
        all_fast=error("fast", False, plain),
    )


def _call(shape: Shape, outliers: bool) -> Call:
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(_TOKENS, shape.hidden_size, generator=generator)
    if outliers:
        channels = torch.randperm(shape.hidden_size, generator=generator)[:OUTLIERS]
        hidden_states[:, channels] *= TIMES
    ids = [torch.randperm(shape.num_experts, generator=generator) for _ in range(_TOKENS)]
    return Call(
        hidden_states.bfloat16(),
        torch.stack(ids)[:, : shape.top_k],
        torch.rand(_TOKENS, shape.top_k, generator=generator).bfloat16(),
    )


class Quality:
    """The model that comes with the package, and how well it predicts with experts of a format."""

    def __init__(self, text_bytes: int = TEXT_BYTES) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = tiny_moe()
        load = AutoModelForCausalLM.from_pretrained
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = load(folder, dtype=torch.bfloat16, experts_implementation="eager").eval()
        self.text = (folder / "heldout.txt").read_text(encoding="utf-8")[:text_bytes]

    def of_hugging_face(self) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a model is slower on several
        try:
            return perplexity(self.model, self.text, self.tokenizer).perplexity
        finally:
            torch.set_num_threads(before)

    def of(self, format: str, mode: str, *, search: bool = False) -> float:
        """Perplexity a byte with every expert packed in this format and run in this mode."""
        covered = []
        try:
            for module in self.model.modules():
                if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
                    module.forward = _packed_forward(module, format, mode, search)
                    covered.append(module)
            return self.of_hugging_face()
        finally:
            for module in covered:
                del module.forward


def _packed_forward(module: Any, format: str, mode: str, search: bool) -> Callable[..., Tensor]:
    experts, hidden_size, intermediate_size = module.down_proj.shape
    packer = ExpertPacker(experts, hidden_size, intermediate_size, format, mode=mode, search=search)
    for e in range(experts):
        gate, up = module.gate_up_proj.detach()[e].chunk(2)
        packer.put(e, gate, up, module.down_proj.detach()[e])
    packed = packer.finish()
    return lambda hidden_states, ids, weights: moe_experts(hidden_states, ids, weights, packed)


def modes_of(format: str) -> tuple[str, ...]:
    return MODES if has_fast(format) else ("exact",)


def rooms() -> str:
    """Which kernels serve here: the errors of "exact" are theirs."""
    exact = _C.kernel_name("int4", "bfloat16", "blocks", "exact").removeprefix("int4_")
    fast = _C.kernel_name("int4", "bfloat16", "blocks", "fast").removeprefix("int4_fast_")
    return f"exact: `{exact}`; fast: `{fast}`"


HEADINGS = (
    "format",
    "weights alone",
    "exact",
    "fast",
    "exact, outliers",
    "fast, outliers",
    "in all, exact",
    "in all, fast",
)


def error_table(of_formats: Mapping[str, Errors]) -> list[str]:
    """Lines of Markdown."""
    rows = []
    for format, e in of_formats.items():
        cells = (
            *(e.weights, e.exact, e.fast, e.exact_outliers, e.fast_outliers),
            *(e.all_exact, e.all_fast),
        )
        rows.append([format, *("" if cell is None else f"{cell:.1e}" for cell in cells)])
    return markdown(HEADINGS, rows)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        "|--|" + "--:|" * (len(headings) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def read_tables(text: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """The tables of such a file: title -> format -> heading -> number."""
    out: dict[str, dict[str, dict[str, float | None]]] = {}
    title = ""
    headings: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            title, headings = line.lstrip("# "), []
        elif line.startswith("|--"):
            continue
        elif line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not headings:
                headings = cells
                continue
            numbers = {
                h: float(c) if c else None
                for h, c in zip(headings, cells, strict=True)
                if h != headings[0]
            }
            out.setdefault(title, {})[cells[0]] = numbers
    return out


def document(progress: Callable[[str], None] = lambda step: None) -> str:
    """The whole file, measured now."""
    return "\n".join(_lines(progress)) + "\n"


def _lines(progress: Callable[[str], None]) -> Iterator[str]:
    yield head()
    quality = Quality()
    progress("perplexity: Hugging Face")
    eager = quality.of_hugging_face()
    rows = []
    base = 0.0
    for format in FORMATS:
        cells = [format]
        for mode in ("exact", "fast"):
            if mode not in modes_of(format):
                cells += ["", ""]
                continue
            progress(f"perplexity: {format} {mode}")
            value = quality.of(format, mode)
            base = base or value
            cells += [f"{value:.4f}", f"{100 * (value / base - 1):+.2f}"]
        rows.append(cells)
    yield ""
    yield "## Perplexity"
    yield ""
    yield f"Hugging Face's own bf16 code, eager: {eager:.4f}. Percentages are against bf16, exact."
    yield ""
    yield from markdown(("format", "exact", "exact, %", "fast", "fast, %"), rows)
    yield ""
    yield "## Errors of a layer"
    for shape in (s for s in SHAPES.values() if s.name != "small"):
        layer = layer_for(shape)
        found = {}
        for format in FORMATS:
            progress(f"errors: {shape.name} {format}")
            found[format] = errors_of(layer, format)
        yield ""
        yield f"### {shape.name}"
        yield ""
        yield from error_table(found)


_HEAD = """
# Accuracy

<!-- written by python -m expertyard.bench.accuracy docs/accuracy.md; a test measures it again -->

A layer has two sources of error. The *format* rounds weights, once, when they are packed. The
*kernel* rounds what it computes with: in mode `exact` activations stay bf16, and `h`, between the
two products, becomes bf16; in mode `fast` both become 8-bit integers in groups of 128. Sums are
fp32, or exact integers.

Kernels that these figures are of: {rooms}. Other rooms multiply in fp32 and are no further off.

- **Perplexity** is that of the model in this package ([tiny_model.md](tiny_model.md)) on the first
  {kib} KiB of text that its training never saw, a byte; only experts are quantised, by plain
  rounding.
- **Errors of a layer** are relative L2 errors of its output against float64, Gaussian weights,
  {tokens} tokens of Gaussian hidden states: of the format alone, of the kernel alone (on the
  weights as the format keeps them), and of both together (*in all*). *Outliers*: {outliers}
  channels of the hidden states are {times} times as large, as some channels of trained models are.

## Which mode

A model's experts run in the mode that these tables choose (`mode="auto"`), where the CPU has 8-bit
dot products:

- **int4, mxfp4: `fast`.** What 8-bit activations add is about a tenth of the format's own error and
  is lost in it (*in all*), also with outliers; perplexity moves by less than 0.05 %.
- **int8: `fast`.** Perplexity cannot tell the two apart. But in a layer the activations' error is
  as large as the weights', and two to four times with outliers: say `mode="exact"` where int8 was
  chosen for its exactness.
- **fp8, bf16** have `exact` only.
"""


def head() -> str:
    """What the file says before its tables."""
    return _HEAD.format(
        rooms=rooms(), outliers=OUTLIERS, times=TIMES, tokens=_TOKENS, kib=TEXT_BYTES >> 10
    ).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes docs/accuracy.md anew (some minutes).")
    parser.add_argument("file", type=Path, help="where to: docs/accuracy.md")
    file: Path = parser.parse_args().file
    text = document(lambda step: print(step, flush=True))
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
