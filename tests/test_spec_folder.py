# SPDX-License-Identifier: Apache-2.0
"""A folder gives exact bytes, and files that are wrong are named with the tensor that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertyard.errors import ExpertyardError, LoadError, SpecError
from expertyard.spec import ModelSpec, resolve_target

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
CONFIG = {
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 10,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 12,
    "moe_intermediate_size": 6, "num_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def tensors(fused: bool = False, dtype: str = "BF16", layers: int = 2) -> Tensors:
    """The checkpoint of CONFIG."""
    found: Tensors = {
        "model.embed_tokens.weight": (dtype, (10, 8)),
        "lm_head.weight": (dtype, (10, 8)),
    }
    found["model.norm.weight"] = (dtype, (8,))
    for layer in range(layers):
        p = f"model.layers.{layer}."
        found[p + "self_attn.q_proj.weight"] = (dtype, (8, 8))
        found[p + "self_attn.k_proj.weight"] = (dtype, (4, 8))
        found[p + "self_attn.v_proj.weight"] = (dtype, (4, 8))
        found[p + "self_attn.o_proj.weight"] = (dtype, (8, 8))
        for name in ("q_norm", "k_norm"):
            found[p + f"self_attn.{name}.weight"] = (dtype, (4,))
        found[p + "mlp.gate.weight"] = (dtype, (3, 8))
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[p + f"{name}.weight"] = (dtype, (8,))
        if fused:
            found[p + "mlp.experts.gate_up_proj"] = (dtype, (3, 12, 8))
            found[p + "mlp.experts.down_proj"] = (dtype, (3, 8, 6))
        else:
            for e in range(3):
                found[p + f"mlp.experts.{e}.gate_proj.weight"] = (dtype, (6, 8))
                found[p + f"mlp.experts.{e}.up_proj.weight"] = (dtype, (6, 8))
                found[p + f"mlp.experts.{e}.down_proj.weight"] = (dtype, (8, 6))
    return found


def header(of: Tensors) -> tuple[dict[str, Any], int]:
    at, entries = 0, {}
    for name, (dtype, shape) in of.items():
        size = BYTES[dtype]
        for n in shape:
            size *= n
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return entries, at


def write_file(path: Path, entries: dict[str, Any], data: int) -> None:
    raw = json.dumps(entries).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))


def write_folder(
    folder: Path, of: Tensors, shards: int = 1, config: dict[str, Any] = CONFIG
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_file(folder / "model.safetensors", *header(of))
        return
    names = list(of)
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: of[name] for name in names[shard::shards]}
        where.update(dict.fromkeys(part, file))
        write_file(folder / file, *header(part))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_exact_bytes(tmp_path: Path, shards: int, fused: bool) -> None:
    write_folder(tmp_path, tensors(fused), shards)
    spec = ModelSpec.from_folder(tmp_path)
    data = header(tensors(fused))[1]
    dense = sum(layer.dense_bytes("bf16") for layer in spec.layers)
    experts = sum(3 * layer.expert_bytes("bf16") for layer in spec.layers)
    outside = 2 * (80 + 80 + 8)
    assert dense + experts + outside == data
    assert spec.total_params * 2 == data
    assert spec == ModelSpec.from_folder(tmp_path)
    config_only = ModelSpec.from_config(tmp_path / "config.json")
    assert dense == sum(layer.dense_bytes("bf16") for layer in config_only.layers)


def test_granite_checkpoints_have_no_word_for_experts(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "granitemoe", "intermediate_size": 6, "head_dim": None,
              "num_local_experts": 3}  # fmt: skip
    of = {
        name.replace("mlp.gate.weight", "block_sparse_moe.router.layer.weight")
        .replace("mlp.experts.gate_up_proj", "block_sparse_moe.input_linear.weight")
        .replace("mlp.experts.down_proj", "block_sparse_moe.output_linear.weight"): entry
        for name, entry in tensors(fused=True).items()
        if "q_norm" not in name and "k_norm" not in name
    }
    write_folder(tmp_path, of, config=config)
    spec = ModelSpec.from_folder(tmp_path)
    assert spec.known_family and spec.layers[0].expert_bytes("bf16") == 2 * 3 * 6 * 8
    assert spec.layers[0].dense_bytes("bf16") == 2 * (2 * 64 + 2 * 32 + 24 + 16)


def test_stored_format_is_exact_and_others_are_computed(tmp_path: Path) -> None:
    write_folder(tmp_path, tensors(dtype="F32"))
    layer = ModelSpec.from_folder(tmp_path).layers[0]
    assert layer.expert_bytes("fp32") == 4 * 3 * 6 * 8
    assert layer.expert_bytes("bf16") == 2 * 3 * 6 * 8
    assert layer.dense_bytes("bf16") * 2 == layer.dense_bytes("fp32")


def test_a_folder_without_weights_is_planned_from_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert resolve_target(tmp_path).num_layers == 2


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def cut_in_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])


def not_json(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((4).to_bytes(8, "little") + b"\xff\xfe{]" + bytes(10))


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def rewrite(folder: Path, change: Any) -> None:
    entries, data = header(tensors())
    change(entries["model.layers.1.mlp.experts.2.up_proj.weight"])
    write_file(folder / "model.safetensors", entries, data)


def wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda entry: entry.update(shape=[6, 9]))


def negative_shape(folder: Path) -> None:
    rewrite(folder, lambda entry: entry.update(shape=[-6, 8]))


def wrong_dtype(folder: Path) -> None:
    rewrite(folder, lambda entry: entry.update(dtype="BF17"))


def wrong_offsets(folder: Path) -> None:
    rewrite(folder, lambda entry: entry.update(data_offsets=[8, 4]))


def overlap(folder: Path) -> None:
    rewrite(folder, lambda entry: entry.update(data_offsets=[0, 96]))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_off, "lm_head|up_proj|down_proj|cut off"), (cut_in_header, "cut"), (huge_header,
        "claims"),
        (not_json, "not JSON"), (empty, "0 bytes"), (wrong_shape, "experts.2.up_proj"),
        (negative_shape, "experts.2.up_proj"), (wrong_dtype, "BF17"), (wrong_offsets,
        "data_offsets"),
        (overlap, "overlaps"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any, named: str) -> None:
    write_folder(tmp_path, tensors())
    damage(tmp_path)
    with pytest.raises(LoadError, match=named) as caught:
        ModelSpec.from_folder(tmp_path)
    assert "model.safetensors" in str(caught.value)


def without(name: str) -> Tensors:
    return {key: value for key, value in tensors().items() if name not in key}


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("layers.1.", "layer 1"), ("layers.1.mlp.experts", "no expert"),
        ("layers.1.mlp.experts.2", "expert 2"), ("layers.0.mlp.experts.1.down_proj", "expert 1"),
    ],
)  # fmt: skip
def test_missing_tensors_are_named(tmp_path: Path, missing: str, said: str) -> None:
    write_folder(tmp_path, without(missing))
    with pytest.raises(LoadError, match=said):
        ModelSpec.from_folder(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, tensors(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(LoadError, match="model-00002-of-00003"):
        ModelSpec.from_folder(tmp_path)


def test_an_index_that_lies_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, tensors(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.layers.7.x"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(LoadError, match=r"layers\.7\.x"):
        ModelSpec.from_folder(tmp_path)
    data["weight_map"]["model.layers.7.x"] = "../../etc/passwd"
    index.write_text(json.dumps(data))
    with pytest.raises(LoadError, match="file names"):
        ModelSpec.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": None}, "not a mixture-of-experts"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_experts_per_tok": 4}, "chooses 4"),
        ({"mlp_only_layers": [0, 1]}, "none of the 2 layers"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "at most"),
    ],
)
def test_a_wrong_config_is_explained(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        ModelSpec.from_config({**CONFIG, **change})


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "null", "\x00", "[" * 100_000])
def test_a_config_that_is_no_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ExpertyardError):
        ModelSpec.from_folder(tmp_path)


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(SpecError, match="no such file"):
        resolve_target("./nowhere/at/all")
