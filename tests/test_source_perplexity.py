# SPDX-License-Identifier: Apache-2.0
"""The trained tiny model, written in every source layout, predicts text as its numbers should.

Each file's own numbers in float32, run by transformers, are the reference: what a reader gets wrong
(an order of nibbles, a zero, a scale) costs far more than the kernels' rounding.
"""

import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer

import checkpoint_writers as writers
import expertyard as ey
from expertyard.models import tiny_moe
from expertyard.models.perplexity import perplexity
from expertyard.models.perplexity_table import main, rows
from hf_families import load

BYTES = 700
# perplexity of a layout's numbers over that of float32: what quantising to it may cost
COST = {
    "fp8": 1.01, "fp8-channel": 1.01, "int8": 1.005, "gptq": 1.10, "awq": 1.08,
    "compressed-tensors": 1.06, "Q8_0": 1.002, "Q4_0": 1.06, "Q4_1": 1.05, "Q5_0": 1.02,
    "Q4_K": 1.05,
}  # fmt: skip


def measure(model):
    text = (tiny_moe() / "heldout.txt").read_text(encoding="utf-8")[:BYTES]
    return perplexity(model, text, AutoTokenizer.from_pretrained(tiny_moe())).perplexity_per_byte


@pytest.fixture(scope="module")
def exact():
    return measure(load(tiny_moe()))


def compare(folder, reference, exact, layout):
    meant = measure(reference)
    got = measure(ey.from_pretrained(folder))
    assert got == pytest.approx(meant, rel=4e-3), (got, meant)
    assert got < exact * COST[layout], (got, exact)


@pytest.mark.parametrize("layout", [name for name in COST if name in writers.FORMATS])
def test_safetensors(tmp_path, exact, layout):
    truth = writers.requantise(tiny_moe(), tmp_path / layout, layout)
    compare(tmp_path / layout, load(truth), exact, layout)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K"])
def test_gguf(tmp_path, exact, kind):
    pytest.importorskip("gguf", reason="pip install gguf")
    from gguf_writers import write_qwen3_moe

    model = load(tiny_moe())
    write_qwen3_moe(model, tmp_path / "m.gguf", kind, down="Q4_0" if kind == "Q4_K" else None)
    model.config.save_pretrained(tmp_path)
    compare(tmp_path / "m.gguf", model, exact, kind)


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
