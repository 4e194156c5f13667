# SPDX-License-Identifier: Apache-2.0
"""The trained model as a Hugging Face folder, and the facts about it, measured on that folder.

To measure a folder again: python examples/tiny_moe/export.py FOLDER
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import tiny
import tokenizer
import torch
from rich.table import Table
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from expertyard.models.perplexity import perplexity

SAMPLE_BYTES = 65536  # of held-out text, kept beside the model
SLICE_BYTES = 4096  # of its start, for a figure that a test can measure in seconds
WINDOW, STRIDE = 512, 256
TEMPERATURE = 0.45  # of sampled text: greedy text falls into a loop
_PROMPTS = (("The function returns", None), ("NAME\n\nperl", 1), ("If you want to", 2))

_README = """\
# tiny-moe: Expertyard's embedded model

{architecture}; {million:.2f} M parameters, byte-level, bf16.
Trained by `examples/tiny_moe/train.py` on {training[train_bytes]:,} bytes of
{source}. It serves examples, tests and the measuring of what weight
formats cost in quality. It writes the words and phrases of technical English and knows nothing.

| held-out text | bits per byte | perplexity per byte |
|--|--:|--:|
{rows}
Whole sample: `heldout.txt`, {num_bytes:,} bytes from files that training never saw, less the
paragraphs that they share with training; window {window}, stride {stride}
(`expertyard.models.perplexity`). `facts.json` has every digit, the training options, samples, and
how often each expert is chosen.

## Licence

The weights come under Apache-2.0 like the rest of the project. `heldout.txt` is an excerpt of
{source_licence}
It is data beside the program, not part of it.
"""

_SOURCES = {
    "perl": "Perl's manual (Debian's perl-doc)",
    "python": "the docstrings of Python's standard library",
}
_LICENCES = {
    "perl": "Perl's documentation, copyright Larry Wall and others, which may be redistributed\n"
    "under the terms of Perl itself: the GNU General Public License (version 1 or later) or the\n"
    "Artistic License. Its markup was taken off and its code examples were left out.",
    "python": "Python's documentation, copyright the Python Software Foundation, which may be\n"
    "redistributed under the PSF License. Its code examples were left out.",
}


def save(model: Qwen3MoeForCausalLM, folder: Path, shape: tiny.Shape) -> None:
    """config, generation_config, bf16 safetensors and tokenizer; model itself stays as it is."""
    rounded = copy.deepcopy(model).to(torch.bfloat16).eval()
    rounded.save_pretrained(folder)
    tokenizer.save(folder, shape.max_context)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes 0600


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return facts


def measure(folder: Path, sample: str) -> dict[str, Any]:
    """Write sample as heldout.txt, measure the folder on it, complete facts.json and README.md.

    Returns the facts. facts["held_out"] has, for each precision (HF, eager experts), the
    perplexity of the whole sample and of its first SLICE_BYTES bytes, and expert_counts
    [num_layers][num_experts], the choices made for the sample in fp32.
    """
    (folder / "heldout.txt").write_text(sample, encoding="utf-8", newline="")
    text = AutoTokenizer.from_pretrained(folder)
    start = sample.encode()[:SLICE_BYTES].decode(errors="ignore")
    held_out: dict[str, Any] = {"window": WINDOW, "stride": STRIDE}
    for name, part in (("sample", sample), ("slice", start)):
        held_out[name] = {"bytes": len(part.encode())}
    for name, dtype in (("hf_fp32", torch.float32), ("hf_bf16_eager", torch.bfloat16)):
        model = Qwen3MoeForCausalLM.from_pretrained(
            folder, dtype=dtype, experts_implementation="eager"
        )
        for place, part in (("sample", sample), ("slice", start)):
            result = perplexity(model, part, text, window=WINDOW, stride=STRIDE)
            held_out[place][name] = {
                "perplexity": round(result.perplexity, 6),
                "bits_per_byte": round(result.bits_per_byte, 6),
            }
        if dtype == torch.float32:
            ids = torch.tensor(text(sample, verbose=False)["input_ids"])
            held_out["expert_counts"] = tiny.expert_usage(model, ids).tolist()
    samples = [continuation(model, text, prompt, seed) for prompt, seed in _PROMPTS]
    facts = read_facts(folder) | {"held_out": held_out, "samples": samples}
    write_facts(folder, facts)
    (folder / "README.md").write_text(_readme(facts, model.config), encoding="utf-8")
    return facts


def continuation(
    model: Qwen3MoeForCausalLM, text: Any, prompt: str, seed: int | None, num_bytes: int = 300
) -> dict[str, Any]:
    """prompt continued by num_bytes bytes: greedily, or sampled from seed."""
    ids = torch.tensor([[tiny.END_OF_TEXT, *prompt.encode()]])
    how: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0}
    out = model.generate(ids, max_new_tokens=num_bytes, **how)[0]
    written = text.decode(out, skip_special_tokens=True)
    return {"prompt": prompt, "seed": seed, "text": written}


def usage_table(facts: dict[str, Any]) -> Table:
    """How often each expert is chosen for the held-out sample, in percent of a layer's choices."""
    counts = facts["held_out"]["expert_counts"]
    table = Table(title="experts, % of the choices in a layer", title_justify="left")
    for heading in ("layer", "least", "even", "most"):
        table.add_column(heading, justify="right")
    for layer, row in enumerate(counts):
        shares = [100 * n / sum(row) for n in row]
        cells = (min(shares), 100 / len(row), max(shares))
        table.add_row(str(layer), *(f"{share:.1f}" for share in cells))
    return table


def _readme(facts: dict[str, Any], config: Any) -> str:
    held_out, training = facts["held_out"], facts["training"]
    names = {"hf_fp32": "HF, fp32", "hf_bf16_eager": "HF, bf16, eager experts"}
    rows = ""
    for place, title in (("sample", "whole sample"), ("slice", f"first {SLICE_BYTES} bytes")):
        for key, name in names.items():
            figures = held_out[place][key]
            rows += (
                f"| {title}, {name} | {figures['bits_per_byte']:.4f} "
                f"| {figures['perplexity']:.4f} |\n"
            )
    return _README.format(
        architecture=(
            f"Qwen3-MoE, {config.num_hidden_layers} layers of hidden size {config.hidden_size}, "
            f"{config.num_experts} experts of {config.moe_intermediate_size} each, "
            f"top-{config.num_experts_per_tok}"
        ),
        million=facts["parameters"] / 1e6,
        training=training,
        source=_SOURCES[training["corpus"]],
        source_licence=_LICENCES[training["corpus"]],
        rows=rows,
        num_bytes=held_out["sample"]["bytes"],
        window=WINDOW,
        stride=STRIDE,
    )


if __name__ == "__main__":
    target = Path(sys.argv[1])
    measure(target, (target / "heldout.txt").read_text(encoding="utf-8"))
