# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes a file has, the readers give weights or an ExpertyardError: no other exception, no
crash, no tensor larger than the file could hold.

A few hundred examples in the suite; `-m slow` runs many more. What once broke is an @example.
"""

import json
import struct
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import checkpoint_writers as writers
from expertyard.errors import ExpertyardError
from expertyard.loading import Checkpoint, GgufCheckpoint, read_quantised
from expertyard.quantize import QuantizedMatrix

ROWS, COLUMNS = 16, 256
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
# (where as a share of the file, what to put there)
_edits = st.lists(
    st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6
)


@cache
def good(layout):
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    if layout == "mxfp4":
        tensors = {f"e_proj{name}": t for name, t in writers.gpt_oss(w[None])[0].items()}
    else:
        tensors = {f"e.{name}": t for name, t in writers.LAYOUTS[layout](w)[0].items()}
    return save({**{name: t.contiguous() for name, t in tensors.items()}, "n": torch.ones(2)})


@cache
def good_gguf():
    """By hand, so that this file runs without the gguf package."""
    tensors = [("q", 8, 34), ("k", 12, 144), ("m", 39, 17), ("z", 14, 210), ("f", 0, 4)]
    infos, data = b"", b""
    for name, kind, width in tensors:
        per = {34: 32, 17: 32, 4: 1}.get(width, 256)
        infos += struct.pack("<Q", 1) + name.encode()
        infos += struct.pack("<IQQQIQ", 3, COLUMNS, 4, 2, kind, len(data))
        data += bytes(range(1, 61)) * (2 * 4 * COLUMNS // per * width // 60 + 1)
        data += bytes(-len(data) % 32)
    pair = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 3) + bytes(12)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + pair + infos
    return head + bytes(-len(head) % 32) + data


def read_all(checkpoint, size):
    for key in checkpoint.keys:
        try:
            if key == "n" or len(checkpoint.shape(key)) == 1:
                continue
            shape = checkpoint.shape(key)
            checkpoint.format(key)
            matrix = checkpoint.matrix(key, 0 if len(shape) == 3 else None)
        except ExpertyardError:
            continue
        number = matrix.codes.numel() if isinstance(matrix, QuantizedMatrix) else matrix.numel()
        assert number <= 8 * size


def open_safetensors(content, quantization):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "m.safetensors")
        file.write_bytes(content)
        try:
            checkpoint = Checkpoint([file])
            read_quantised(checkpoint, quantization)
        except ExpertyardError as error:
            assert (
                "m.safetensors" in str(error) or "config.json" in str(error) or folder in str(error)
            )
            return
        read_all(checkpoint, len(content))


def open_gguf(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "m.gguf")
        file.write_bytes(content)
        try:
            checkpoint = GgufCheckpoint([file])
        except ExpertyardError as error:
            assert "m.gguf" in str(error)
            return
        read_all(checkpoint, len(content))


def edited(content, edits, cut):
    changed = bytearray(content)
    for share, piece in edits:
        at = int(share * (len(changed) - 1))
        changed[at : at + len(piece)] = piece
    return bytes(changed[: int(cut * len(changed))])


def edited_header(content, number, name, value):
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    entry = sorted(key for key in header if key != "__metadata__")[number % (len(header)) - 1]
    if name is None:
        header[entry] = value
    else:
        header[entry][name] = value
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


LAYOUTS = [*writers.LAYOUTS, "mxfp4"]


def damaged_bytes(layout, edits, cut, configured):
    config = writers.QUANT_CONFIGS[layout] if configured else None
    open_safetensors(edited(good(layout), edits, cut), config)


def damaged_headers(layout, number, name, value):
    open_safetensors(
        edited_header(good(layout), number, name, value), writers.QUANT_CONFIGS[layout]
    )


def damaged_settings(layout, key, value):
    changed = {**writers.QUANT_CONFIGS[layout], key: value}
    if key == "weights":
        changed = {**writers.QUANT_CONFIGS[layout], "config_groups": {"g": {"weights": value}}}
    open_safetensors(good(layout), changed)


_bytes = {
    "layout": st.sampled_from(LAYOUTS),
    "edits": _edits,
    "cut": st.just(1.0) | st.floats(0, 1),
    "configured": st.booleans(),
}
_headers = {
    "layout": st.sampled_from(LAYOUTS),
    "number": st.integers(0, 6),
    "name": st.sampled_from([None, "dtype", "shape", "data_offsets"]),
    "value": _json
    | st.lists(st.integers(-1, 512), max_size=4)
    | st.sampled_from(["F32", "U8", "I32", "F8_E4M3", "F8_E5M2", "BF16", "I64", "F4"]),
}
_settings = {
    "layout": st.sampled_from(LAYOUTS),
    "key": st.sampled_from(
        ["bits", "group_size", "sym", "desc_act", "weight_block_size", "config_groups", "weights",
         "version", "zero_point", "checkpoint_format", "quant_method"]
    ),
    "value": _json | st.integers(-2, 300) | st.dictionaries(
        st.sampled_from(["num_bits", "group_size", "block_structure"]), _json
    ),
}  # fmt: skip
_gguf = {"edits": _edits, "cut": st.just(1.0) | st.floats(0, 1)}


def test_the_good_files_are_good():
    for layout in LAYOUTS:
        open_safetensors(good(layout), writers.QUANT_CONFIGS[layout])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "m.gguf").write_bytes(good_gguf())
        assert len(GgufCheckpoint([Path(folder, "m.gguf")]).keys) == 5


test_damaged_bytes = QUICK(given(**_bytes)(damaged_bytes))
test_damaged_headers = QUICK(
    example(layout="fp8", number=1, name="dtype", value=[])(given(**_headers)(damaged_headers))
)
test_damaged_settings = QUICK(
    example(layout="fp8", key="weight_block_size", value={"": None})(
        example(layout="compressed-tensors", key="weights", value={"num_bits": []})(
            example(layout="compressed-tensors", key="weights", value={"group_size": []})(
                given(**_settings)(damaged_settings)
            )
        )
    )
)


@QUICK
@example(edits=[(0.02, b"\x91")], cut=1.0)  # an offset that is no multiple of the alignment
@given(**_gguf)
def test_damaged_gguf(edits, cut):
    open_gguf(edited(good_gguf(), edits, cut))


@pytest.mark.slow
@LONG
@given(**_bytes)
def test_damaged_bytes_for_long(layout, edits, cut, configured):
    damaged_bytes(layout, edits, cut, configured)


@pytest.mark.slow
@LONG
@given(**_headers)
def test_damaged_headers_for_long(layout, number, name, value):
    damaged_headers(layout, number, name, value)


@pytest.mark.slow
@LONG
@given(**_settings)
def test_damaged_settings_for_long(layout, key, value):
    damaged_settings(layout, key, value)


@pytest.mark.slow
@LONG
@given(edits=_edits, cut=st.just(1.0) | st.floats(0, 1), head=st.booleans())
def test_damaged_gguf_for_long(edits, cut, head):
    if head:  # most of what can go wrong is in the first bytes
        edits = [(share * 0.04, piece) for share, piece in edits]
    open_gguf(edited(good_gguf(), edits, cut))
