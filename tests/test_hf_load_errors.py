# SPDX-License-Identifier: Apache-2.0
"""Bad checkpoints: a LoadError that names file and tensor, before anything has been loaded."""

import json
import shutil
import struct

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

import expertyard as ey
from expertyard.errors import LoadError
from hf_families import load, save, tiny_model

KEY = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model = tiny_model("qwen3_moe", torch.bfloat16, mlp_only_layers=[])
    return save(model, tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def refused(folder, **options):
    with pytest.raises(LoadError) as caught:
        load(folder, torch.bfloat16, quantization_config=ey.ExpertsConfig(), **options)
    return str(caught.value)


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_truncated_file_names_the_tensor_cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = refused(folder)
    assert str(file) in message and "cut off" in message and "tensor '" in message


@pytest.mark.parametrize("size", [0, 5, 40])
def test_a_file_cut_inside_its_header_is_named(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert str(file) in refused(folder)


def test_a_header_that_is_no_json_is_named(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    message = refused(folder)
    assert str(file) in message and "corrupt" in message


def test_a_tensor_that_claims_more_than_it_has_is_named(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[KEY]["shape"] = [41, 72]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    message = refused(folder)
    assert str(file) in message and KEY in message


def test_a_missing_expert_is_named(folder):
    edit(folder, lambda tensors: tensors.pop(KEY))
    message = refused(folder)
    assert KEY in message and "missing" in message and "model.safetensors" in message


def test_missing_experts_of_a_whole_layer_are_named(folder):
    def drop(tensors):
        for key in [key for key in tensors if "layers.1.mlp.experts." in key]:
            del tensors[key]

    edit(folder, drop)
    assert "layers.1" in refused(folder)


def test_a_missing_projection_is_named(folder):
    def drop(tensors):
        for key in [key for key in tensors if "layers.1.mlp.experts." in key and "up_proj" in key]:
            del tensors[key]

    edit(folder, drop)
    message = refused(folder)
    assert "layers.1" in message and "up_proj" in message


def test_a_wrong_shape_names_file_tensor_expected_and_got(folder):
    edit(folder, lambda tensors: tensors.update({KEY: torch.zeros(40, 70, dtype=torch.bfloat16)}))
    message = refused(folder)
    assert "model.safetensors" in message and KEY in message
    assert "40, 72" in message and "40, 70" in message


def test_a_wrong_dtype_is_named(folder):
    edit(folder, lambda tensors: tensors.update({KEY: torch.zeros(40, 72, dtype=torch.int8)}))
    message = refused(folder)
    assert KEY in message and "I8" in message


def test_a_config_of_another_model_is_noticed(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_local_experts"] = 7  # what transformers 5 calls it in the file
    (folder / "config.json").write_text(json.dumps(config))
    assert "experts" in refused(folder)


def test_a_pickle_checkpoint_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    message = refused(folder)
    assert "pytorch_model.bin: expected a .safetensors file" in message


def test_nothing_is_read_before_the_checks(folder, monkeypatch):
    """Headers are enough: the error comes before the first weight."""
    from expertyard.loading import Checkpoint

    def read(self, key):
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(Checkpoint, "tensor", read)
    edit(folder, lambda tensors: tensors.pop(KEY))
    refused(folder)
