# SPDX-License-Identifier: Apache-2.0
"""Damaged quantised checkpoints: a LoadError that names file and tensor, nothing half loaded."""

import json
import shutil
import struct

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

import checkpoint_writers as writers
import expertyard as ey
from expertyard.errors import LoadError
from expertyard.loading import Checkpoint, GgufCheckpoint, read_quantised
from test_from_pretrained import quantised

STEM = "model.layers.1.mlp.experts.5.up_proj"
# a layout's tensor of codes and its tensor of scales
PARTS = {
    "fp8": ("weight", "weight_scale_inv"),
    "gptq": ("qweight", "scales"),
    "awq": ("qweight", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    made = {}

    def get(layout):
        if layout not in made:
            made[layout] = quantised(tmp_path_factory.mktemp("good"), layout)[0]
        return made[layout]

    return get


@pytest.fixture(params=PARTS)
def layout(request):
    return request.param


@pytest.fixture
def folder(good, layout, tmp_path):
    return shutil.copytree(good(layout), tmp_path / "model")


def refused(folder):
    with pytest.raises(LoadError) as caught:
        ey.from_pretrained(folder)
    return str(caught.value)


def file_of(folder, key):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][key]


def edit(folder, key, change):
    """change(tensors of the key's file)"""
    file = file_of(folder, key)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def test_a_missing_part_is_named(folder, layout):
    for part in PARTS[layout]:
        copy = shutil.copytree(folder, folder.with_name(part))
        key = f"{STEM}.{part}"
        edit(copy, key, lambda tensors, key=key: tensors.pop(key))
        message = refused(copy)
        assert key in message and str(copy) in message


def test_a_missing_scale_that_no_index_knows_is_named(folder, layout):
    key = f"{STEM}.{PARTS[layout][1]}"
    edit(folder, key, lambda tensors: tensors.pop(key))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][key]
    index.write_text(json.dumps(content))
    message = refused(folder)
    assert STEM in message and "missing" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_no_numbers_are_named(folder, layout, value):
    key = f"{STEM}.{PARTS[layout][1]}"

    def change(tensors):
        tensors[key].view(-1)[3 % tensors[key].numel()] = value

    file = edit(folder, key, change)
    message = refused(folder)
    assert str(file) in message and key in message and "NaN or infinite" in message


def test_scales_of_another_shape_are_named(folder, layout):
    key = f"{STEM}.{PARTS[layout][1]}"
    file = edit(folder, key, lambda t: t.update({key: t[key][..., :-1].contiguous()}))
    message = refused(folder)
    assert str(file) in message and STEM in message


def test_codes_of_another_dtype_are_named(folder, layout):
    key = f"{STEM}.{PARTS[layout][0]}"
    edit(folder, key, lambda t: t.update({key: torch.zeros(t[key].shape, dtype=torch.int64)}))
    message = refused(folder)
    assert key in message and "I64" in message


def test_codes_of_another_shape_are_named(folder, layout):
    key = f"{STEM}.{PARTS[layout][0]}"
    edit(folder, key, lambda t: t.update({key: t[key][:-8].contiguous()}))
    assert STEM in refused(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refused(folder)
    assert "model-00002-of-00002.safetensors: no such file" in message and "Download" in message


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", 3])
def test_an_index_that_leaves_the_folder_is_refused(folder, name):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][f"{STEM}.{'x'}"] = name
    index.write_text(json.dumps(content))
    message = refused(folder)
    assert str(index) in message and "weight_map" in message
    assert name == 3 or name in message


def test_a_tensor_in_two_files_is_named(folder):
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "other.safetensors")
    message = refused(folder)
    assert (
        "other.safetensors" in message and "is in model-00001-of-00002.safetensors too" in message
    )


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_file_names_the_tensor_cut_off(folder, cut):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    message = refused(folder)
    assert str(file) in message and "cut off" in message


@pytest.mark.parametrize("length", [0, 3, 1 << 40, (1 << 64) - 1])
def test_a_wrong_header_length_is_named(folder, length):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    assert str(file) in refused(folder)


def test_nothing_is_allocated_for_a_header_that_claims_too_much(tmp_path):
    """A tensor of 2^50 weights in a file of a kilobyte."""
    header = {"w": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(1024))
    with pytest.raises(LoadError, match="tensor 'w': ends at byte"):
        Checkpoint([tmp_path / "m.safetensors"])


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3},
        {"bits": "four"},
        {"group_size": 0},
        {"group_size": 100},
        {"group_size": "x"},
        {"group_size": -1},
        {"group_size": 64},
    ],
)
def test_settings_that_do_not_fit_the_files_are_named(tmp_path, settings):
    tensors, _ = writers.gptq(torch.randn(64, 256))
    save_file({f"m.{name}": t for name, t in tensors.items()}, tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match=r"config\.json"):
        read_quantised(
            Checkpoint([tmp_path / "m.safetensors"]), {**writers.QUANT_CONFIGS["gptq"], **settings}
        )


def gguf(path, tensors=1, pairs=0, body=b""):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + body)
    return path


def string(text):
    return struct.pack("<Q", len(text)) + text


ABSURD = {
    "tensors": {"tensors": 1 << 60},
    "pairs": {"pairs": 1 << 60},
    "a string": {"pairs": 1, "body": struct.pack("<Q", 1 << 61) + bytes(64)},
    "an array": {"pairs": 1, "body": string(b"k") + struct.pack("<IIQ", 9, 4, 1 << 59) + bytes(64)},
    "strings in an array": {
        "pairs": 1,
        "body": string(b"k") + struct.pack("<IIQ", 9, 8, 1 << 40) + bytes(64),
    },
    "dimensions": {"body": string(b"t") + struct.pack("<I", 1 << 31) + bytes(64)},
    "sizes": {"body": string(b"t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0) + bytes(64)},
    "a type": {"body": string(b"t") + struct.pack("<IQIQ", 1, 4, 9999, 0) + bytes(64)},
    "an offset": {"body": string(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1 << 50) + bytes(64)},
    "depth": {"pairs": 1, "body": string(b"k") + struct.pack("<IIQ", 9, 9, 1) * 40},
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_counts_in_gguf_are_refused_at_once(tmp_path, what):
    with pytest.raises(LoadError, match=r"x\.gguf: "):
        GgufCheckpoint([gguf(tmp_path / "x.gguf", **ABSURD[what])])


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(40), b"GGUF" + bytes(30)])
def test_what_is_no_gguf_is_named(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(LoadError, match=r"x\.gguf: "):
        GgufCheckpoint([tmp_path / "x.gguf"])


def sparse_gguf(path, pairs, body, size):
    """A file that claims to be large, and is: with a hole."""
    gguf(path, tensors=0, pairs=pairs, body=body)
    with path.open("r+b") as file:
        file.truncate(size)
    return path


KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    "body",
    [
        KEY + struct.pack("<IIQ", 9, 8, 1 << 34),  # 2^34 empty strings
        KEY + struct.pack("<IIQ", 9, 9, 1 << 33),  # 2^33 empty arrays
        KEY + struct.pack("<IQ", 8, 1 << 36),  # one string of 64 GiB
    ],
    ids=["strings", "arrays", "text"],
)
def test_absurd_counts_that_the_file_could_hold_are_refused_at_once(tmp_path, body):
    path = sparse_gguf(tmp_path / "x.gguf", 1, body, 1 << 38)
    with pytest.raises(LoadError, match=r"x\.gguf: "):
        GgufCheckpoint([path])


def test_a_gguf_tensor_of_no_size_is_named(tmp_path):
    info = struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 32, 0, 0, 0)
    with pytest.raises(LoadError, match="tensor 't': has a size of 0"):
        GgufCheckpoint([gguf(tmp_path / "x.gguf", body=info + bytes(64))])


def raw_file(path, header, data=b""):
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_a_name_that_a_header_has_twice_is_named(tmp_path):
    entry = b'"w":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    header = b"{" + entry % (0, 1) + b"," + entry % (1, 2) + b"}"
    with pytest.raises(LoadError, match=r"m\.safetensors: the header names 'w' twice"):
        Checkpoint([raw_file(tmp_path / "m.safetensors", header, b"ab")])


def test_a_name_that_an_index_has_twice_is_named(folder):
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace('"weight_map": {', '"weight_map": {"x": "a", "x": "b", ')
    index.write_text(text)
    message = refused(folder)
    assert str(index) in message and "names 'x' twice" in message


@pytest.mark.parametrize("shape", ["[" + "2," * 100000 + "0]", "[" + "9" * 4000 + "]"])
def test_a_shape_that_no_tensor_has_is_refused_at_once(tmp_path, shape):
    header = b'{"w":{"dtype":"U8","shape":%s,"data_offsets":[0,0]}}' % shape.encode()
    with pytest.raises(LoadError, match="tensor 'w': shape: expected") as caught:
        Checkpoint([raw_file(tmp_path / "m.safetensors", header)])
    assert len(str(caught.value)) < 1000
