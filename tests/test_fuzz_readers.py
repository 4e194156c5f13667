# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes a file has, the readers give weights or an ExpertyardError: no other exception, no
crash, no endless work, no tensor larger than the file could hold.

A few hundred examples in the suite. `-m slow` goes on for EXPERTYARD_FUZZ_SECONDS (20) a kind of
damage, from a new seed each time, and says how many inputs that were. What once broke is an
@example.
"""

import json
import os
import random
import signal
import struct
import tempfile
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

import checkpoint_writers as writers
from expertyard.errors import ExpertyardError
from expertyard.formats import get_format
from expertyard.linear import pack_matrix
from expertyard.loading import Checkpoint, ExpertsLayout, GgufCheckpoint, read_quantised
from expertyard.loading.packed_folder import (
    MANIFEST,
    Manifest,
    PackedFile,
    PackedFolder,
    PackedLayer,
    PackedMatrix,
    file_hash,
    write_manifest,
)
from expertyard.loading.writer import new_file
from expertyard.packing import ExpertPacker
from expertyard.quantize import BlockMatrix, QuantizedMatrix, quantize
from expertyard.spec.headers import read_folder

ROWS, COLUMNS = 16, 256
PATIENCE = 10  # seconds of this process' time that one input may take
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(
    QUICK, max_examples=300, database=None, phases=[Phase.generate, Phase.shrink, Phase.explain]
)

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
_counts = st.sampled_from(
    [0, 1, 2, 3, 255, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1]
)
# (where as a share of the file, what to put there)
_edits = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9) | _counts.map(lambda n: struct.pack("<Q", n)),
    ),
    min_size=1,
    max_size=6,
)


@contextmanager
def patience():
    """An input that takes longer is a failure like any other, and shrinks."""

    def stop(*_):
        raise AssertionError(f"a reader has worked on this for {PATIENCE} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


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
    tensors = [("q", 8, 34), ("k", 12, 144), ("m", 39, 17), ("z", 14, 210), ("f", 0, 4),
               ("o", 7, 24), ("h", 13, 176)]  # fmt: skip
    infos, data = b"", b""
    for name, kind, width in tensors:
        per = {34: 32, 17: 32, 24: 32, 4: 1}.get(width, 256)
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
        if isinstance(matrix, BlockMatrix):
            matrix = matrix.float()
            assert matrix.isfinite().all()
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


def edited_json(value, number, instead):
    """The value with one of its nodes, in the order in which they are written, replaced."""
    left = [number]

    def walk(node):
        left[0] -= 1
        if left[0] < 0:
            left[0] = 1 << 60
            return instead
        if isinstance(node, dict):
            return {key: walk(inner) for key, inner in node.items()}
        return [walk(inner) for inner in node] if isinstance(node, list) else node

    return walk(value)


@cache
def good_folder():
    """Two files and their index."""
    made = {name: {f"{name}.w": torch.ones(4, 4), f"{name}.b": torch.ones(4)} for name in "ac"}
    index = {
        "metadata": {"total_size": 160},
        "weight_map": {key: f"{name}.safetensors" for name in made for key in made[name]},
    }
    return {f"{name}.safetensors": save(tensors) for name, tensors in made.items()}, index


LAYOUT = ExpertsLayout(2, 64, 32, "silu", has_bias=True)


@cache
def good_packed():
    """The files of a packed folder with one layer, and its manifest."""
    packer = ExpertPacker(2, 64, 32, "int4-g32", has_bias=True)
    for number in range(2):
        w = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(number))
        bias = {"gate_bias": w[0, :, 0], "up_bias": w[1, :, 0], "down_bias": w[2, 0]}
        packer.put(number, w[0], w[1], w[2].T, **bias)
    tensors = {"x.blobs": torch.stack([torch.cat(packer.blobs(number)) for number in range(2)])}
    for name, size in (("gate_bias", 32), ("up_bias", 32), ("down_bias", 64)):
        tensors[f"x.{name}"] = torch.zeros(2, size)
    other, scale_type = pack_matrix(quantize(torch.ones(32, 64), get_format("int4-g32")))
    tensors["y.packed"] = other
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "e.safetensors")
        with new_file(file, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as to:
            for name, tensor in tensors.items():
                to[name].copy_(tensor)
            del to
        content = file.read_bytes()
        layer = PackedLayer.of(file.name, packer.finish(), has_bias=True)
        noted = PackedFile(len(content), file_hash(file))
        matrix = PackedMatrix(file.name, "int4-g32", scale_type, 32, 64)
        done = Manifest({"x": layer}, {"y": matrix}, {file.name: noted}, {"job": {}})
        write_manifest(Path(folder, MANIFEST), done)
        return content, json.loads(Path(folder, MANIFEST).read_text())


def open_packed(content, manifest, good=False):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "e.safetensors").write_bytes(content)
        Path(folder, MANIFEST).write_text(manifest)
        try:
            packed = PackedFolder(Path(folder))
            assert packed.format
            packed.check({"x": LAYOUT})
            assert packed.experts("x", LAYOUT, "cpu").num_experts == 2
            packed.check_matrices({"y": (32, 64)})
            if packed.matrices:  # a folder without them is one of version 1
                assert packed.matrix("y").numel() == packed.matrices["y"].blob_bytes()
        except ExpertyardError as error:
            assert folder in str(error) and not good


def damaged_packed_files(edits, cut):
    content, manifest = good_packed()
    open_packed(edited(content, edits, cut), json.dumps(manifest))


def damaged_manifests(number, value, edits):
    manifest = edited_json(good_packed()[1], number, value)
    text = json.dumps(manifest)
    if edits:
        text = edited(text.encode(), edits, 1.0).decode("utf-8", "replace")
    open_packed(good_packed()[0], text)


def damaged_index(number, value, edits):
    files, index = good_folder()
    text = json.dumps(edited_json(index, number, value)).encode()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        Path(folder, "model.safetensors.index.json").write_bytes(
            edited(text, edits, 1.0) if edits else text
        )
        try:
            found = read_folder(Path(folder))
        except ExpertyardError as error:
            assert folder in str(error)
            return
        assert all(info.file.parent == Path(folder) for info in found.values())


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
    content, manifest = good_packed()
    open_packed(content, json.dumps(manifest), good=True)
    for layout in LAYOUTS:
        open_safetensors(good(layout), writers.QUANT_CONFIGS[layout])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "m.gguf").write_bytes(good_gguf())
        assert len(GgufCheckpoint([Path(folder, "m.gguf")]).keys) == 7


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
@example(edits=[(0.01657, b"\x91")], cut=1.0)  # an offset that is no multiple of the alignment
@given(**_gguf)
def test_damaged_gguf(edits, cut):
    open_gguf(edited(good_gguf(), edits, cut))


_damage = {
    "number": st.integers(0, 40),
    "value": _json | st.integers() | st.sampled_from(["../x", "a.safetensors", "int4", "bf16"]),
    "edits": st.just([]) | _edits,
}
test_damaged_packed_files = QUICK(given(**_gguf)(damaged_packed_files))
test_damaged_manifests = QUICK(given(**_damage)(damaged_manifests))
test_damaged_index = QUICK(given(**_damage)(damaged_index))


def damaged_gguf(edits, cut, head):
    if head:  # most of what can go wrong is in the first bytes
        edits = [(share * 0.04, piece) for share, piece in edits]
    open_gguf(edited(good_gguf(), edits, cut))


TARGETS = {
    "bytes": (damaged_bytes, _bytes),
    "headers": (damaged_headers, _headers),
    "settings": (damaged_settings, _settings),
    "gguf": (damaged_gguf, {**_gguf, "head": st.booleans()}),
    "packed files": (damaged_packed_files, _gguf),
    "manifests": (damaged_manifests, _damage),
    "index": (damaged_index, _damage),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_for_long(target, capsys):
    damage, strategies = TARGETS[target]
    inputs = 0

    def watched(**arguments):
        nonlocal inputs
        inputs += 1
        with patience():
            damage(**arguments)

    # of this process' own time: a machine that sleeps or is busy does not shorten the search
    begin, seconds = time.process_time(), float(os.environ.get("EXPERTYARD_FUZZ_SECONDS", 20))
    while time.process_time() - begin < seconds:
        seed(random.SystemRandom().getrandbits(64))(LONG(given(**strategies)(watched)))()
    with capsys.disabled():
        print(f"{target}: {inputs} inputs in {time.process_time() - begin:.0f} s", flush=True)
