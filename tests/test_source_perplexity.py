# SPDX-License-Identifier: Apache-2.0
"""The trained tiny model, written in every source layout, predicts text as its numbers should.

Each file's own numbers in float32, run by transformers, are the reference: what a reader gets wrong
(an order of nibbles, a zero, a scale) costs far more than the kernels' rounding.

    PYTHONPATH=python python tests/test_source_perplexity.py [BYTES]

prints the table of docs/checkpoints.md.
"""

import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import checkpoint_writers as writers
import expertyard as ey
from expertyard.models import tiny_moe
from expertyard.models.perplexity import perplexity
from expertyard.models.perplexity_table import main, rows
from hf_families import load

BYTES = 700
# layout: what quantising to it may cost, as a factor of the perplexity of float32
COST = {
    "bf16": 1.001, "fp16": 1.001, "fp8": 1.01, "fp8-channel": 1.01, "int8": 1.005, "mxfp4": 1.10,
    "gptq": 1.10, "awq": 1.08, "compressed-tensors": 1.06, "compressed-tensors-g64": 1.08,
    "compressed-tensors-g128": 1.10,
}  # fmt: skip
# type of gate and up: type of down (rows of 128 are no superblock), cost
GGUF = {
    "F16": ("F16", 1.001), "BF16": ("BF16", 1.001), "Q8_0": ("Q8_0", 1.002),
    "Q6_K": ("Q8_0", 1.005), "Q5_K": ("Q5_0", 1.02), "Q5_1": ("Q5_1", 1.02),
    "Q5_0": ("Q5_0", 1.02), "Q4_K": ("Q4_0", 1.05), "Q4_1": ("Q4_1", 1.05), "Q4_0": ("Q4_0", 1.06),
}  # fmt: skip


def measure(model, num_bytes=BYTES):
    text = (tiny_moe() / "heldout.txt").read_bytes()[:num_bytes].decode("utf-8", "ignore")
    return perplexity(model, text, AutoTokenizer.from_pretrained(tiny_moe())).perplexity_per_byte


@pytest.fixture(scope="module")
def exact():
    return measure(load(tiny_moe()))


def write_safetensors(folder, layout):
    """(what to load, a model with its numbers in float32)"""
    if layout in ("bf16", "fp16"):
        folder.mkdir()
        dtype = torch.bfloat16 if layout == "bf16" else torch.float16
        load(tiny_moe()).to(dtype).save_pretrained(folder)
        return folder, load(folder)
    source = tiny_moe()
    if layout == "mxfp4":  # kept for all experts at once, gate rows then up rows
        source = folder.with_name("fused")
        source.mkdir()
        load(tiny_moe()).config.save_pretrained(source)
        tensors = load_file(tiny_moe() / "model.safetensors")
        save_file(fused(tensors), source / "model.safetensors", metadata={"format": "pt"})
    truth = writers.requantise(source, folder, layout)
    if layout == "mxfp4":
        turn_round(truth / "model.safetensors")
    return folder, load(truth)


def turn_round(file):
    tensors = load_file(file)
    turned = {
        name: t.transpose(1, 2).contiguous() if ".experts." in name else t
        for name, t in tensors.items()
    }
    save_file(turned, file, metadata={"format": "pt"})


def fused(tensors):
    """gate_up_proj [E, 2I, H] and down_proj [E, H, I], turned round: requantise() takes them as
    gpt-oss has them, and the layout on disk is [E, out, in] again."""
    made = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in sorted({name.partition(".mlp")[0] for name in tensors if ".experts." in name}):
        stem = f"{layer}.mlp.experts"
        experts = range(sum(name.startswith(f"{stem}.") and "gate" in name for name in tensors))
        parts = {
            part: torch.stack([tensors[f"{stem}.{e}.{part}_proj.weight"] for e in experts])
            for part in ("gate", "up", "down")
        }
        both = torch.cat([parts["gate"], parts["up"]], 1)
        made[f"{stem}.gate_up_proj"] = both.transpose(1, 2).contiguous()
        made[f"{stem}.down_proj"] = parts["down"].transpose(1, 2).contiguous()
    return made


def write_gguf(folder, kind):
    pytest.importorskip("gguf", reason="pip install gguf")
    from gguf_writers import write_qwen3_moe

    folder.mkdir()
    model = load(tiny_moe())
    write_qwen3_moe(model, folder / "m.gguf", kind, down=GGUF[kind][0], random=False)
    model.config.save_pretrained(folder)
    return folder / "m.gguf", model


def compare(source, reference, exact, cost):
    meant = measure(reference)
    got = measure(ey.from_pretrained(source))
    assert got == pytest.approx(meant, rel=4e-3), (got, meant)
    assert got < exact * cost, (got, exact)


@pytest.mark.parametrize("layout", COST)
def test_safetensors(tmp_path, exact, layout):
    compare(*write_safetensors(tmp_path / layout, layout), exact, COST[layout])


@pytest.mark.parametrize("kind", GGUF)
def test_gguf(tmp_path, exact, kind):
    compare(*write_gguf(tmp_path / kind, kind), exact, GGUF[kind][1])


def test_the_table_of_formats(capsys):
    table = rows(["bf16", "int8", "int4-g32", "mxfp4"], BYTES)
    by_name = {(row.name, row.search): row for row in table}
    exact = table[0].perplexity
    assert by_name["bf16", False].perplexity == pytest.approx(exact, rel=2e-3)
    assert by_name["int8", False].perplexity == pytest.approx(exact, rel=5e-3)
    assert by_name["int4-g32", True].perplexity < 1.05 * exact
    assert by_name["int4-g32", False].bits == pytest.approx(4.5)
    assert by_name["mxfp4", False].bits == pytest.approx(4.25)
    main(["--bytes", "600", "--formats", "int8"])
    assert "| int8 | plain | 8" in capsys.readouterr().out


def print_table(num_bytes):
    exact = measure(load(tiny_moe()), num_bytes)
    print(f"float32, transformers: {exact:.4f}\n")
    print("| written as | experts in | perplexity a byte | of these numbers in float32 | more |")
    print("|--|--|--:|--:|--:|")
    for name, write in [
        *((layout, write_safetensors) for layout in COST),
        *((kind, write_gguf) for kind in GGUF),
    ]:
        with tempfile.TemporaryDirectory() as folder:
            source, reference = write(Path(folder, "made"), name)
            meant = measure(reference, num_bytes)
            model = ey.from_pretrained(source)
            formats = " ".join(sorted({row.format for row in ey.verify(model).layers}))
            got = measure(model, num_bytes)
        down = GGUF[name][0] if write is write_gguf else name
        title = f"GGUF {name}" if write is write_gguf else name
        title += "" if down == name else f", down {down}"
        print(
            f"| {title} | {formats} | {got:.4f} | {meant:.4f} | {100 * (got / exact - 1):+.2f} % |",
            flush=True,
        )


if __name__ == "__main__":
    print_table(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
