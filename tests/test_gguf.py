# SPDX-License-Identifier: Apache-2.0
"""GGUF files of the real writer: every block type means what its own dequantiser says."""

import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gguf", reason="pip install gguf")

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

import expertyard as ey
from expertyard.errors import LoadError
from expertyard.formats import get_format
from expertyard.linear import PackedLinear
from expertyard.loading import GgufCheckpoint, gguf_files
from expertyard.packing import ExpertPacker
from expertyard.quantize import QuantizedMatrix, quantize
from gguf_writers import K_TYPES, PLAIN, encode, write_qwen3_moe
from hf_families import greedy, load, logits, prompts, save, tiny_model

SIZES = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "head_dim": 64,
    "mlp_only_layers": [],
    "norm_topk_prob": True,  # what transformers makes of every qwen3moe file
}
NATIVE = {
    "F32": "fp32", "F16": "fp16", "BF16": "bf16", "Q8_0": "int8-g32", "Q4_0": "int4-g32",
    "Q4_1": "int4-g32-asym", "Q5_0": "int8-g32", "Q5_1": "int8-g32", "Q4_K": "int4-g32-asym",
    "Q5_K": "int8-g32", "Q6_K": "int8-g32", "MXFP4": "mxfp4",
}  # fmt: skip
EXACT = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "MXFP4")


def write(path, tensors):
    writer = GGUFWriter(path, "test")
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", NATIVE)
def test_every_type_is_read_as_its_own_numbers(tmp_path, kind):
    values = np.random.default_rng(0).normal(size=(3, 8, 512)) * 0.05
    raw, meant = encode(values, kind)
    checkpoint = GgufCheckpoint([write(tmp_path / "x.gguf", {"w": (raw, kind)})])
    assert checkpoint.shape("w") == (3, 8, 512)
    assert checkpoint.format("w") == NATIVE[kind]
    stored = checkpoint.stored("w")
    assert (stored is None or not stored.loss) == (kind in EXACT)
    for expert in range(3):
        matrix = checkpoint.matrix("w", expert)
        if isinstance(matrix, QuantizedMatrix):
            assert matrix.format.name == NATIVE[kind]
            matrix = matrix.dequantize()
        expected = torch.from_numpy(meant[expert])
        if kind in EXACT or stored.format == "int8-g32":
            assert torch.equal(matrix.float(), expected)
        else:
            largest = expected.abs().max()
            assert (matrix - expected).abs().max() < 2e-3 * largest


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("format", ["int8-g32", "int8", "int4-g32-asym", "fp8", "mxfp4"])
@pytest.mark.parametrize("kind", ["Q5_1", "Q5_K", "Q6_K"])
def test_blocks_are_packed_as_their_numbers_are(tmp_path, kind, format, search):
    columns = 288 if kind == "Q5_1" else 512  # 288: the last group of fp8 is short
    values = np.random.default_rng(1).normal(size=(2, 150, columns)) * 0.05
    raw, _ = encode(values, kind)
    checkpoint = GgufCheckpoint([write(tmp_path / "x.gguf", {"w": (raw, kind)})])
    gate, up = (checkpoint.matrix("w", expert) for expert in range(2))
    down = torch.randn(columns, 150, generator=torch.Generator().manual_seed(2))
    packer = ExpertPacker(3, columns, 150, format, search=search)
    packer.put(0, gate, up, down)
    packer.put(1, gate.float(), up.float(), down)
    packer.put(2, *(quantize(w, get_format(format), search=search) for w in (gate, up, down)))
    for number in (1, 2):
        for got, expected in zip(packer.blobs(0), packer.blobs(number), strict=True):
            assert torch.equal(got, expected)
    apart = quantize(gate[::2], get_format("int8-g32"))
    assert torch.equal(apart.codes, quantize(gate.float()[::2], get_format("int8-g32")).codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "at"),
    [("Q8_0", 0), ("Q4_0", 0), ("Q4_1", 2), ("Q5_0", 0), ("Q5_1", 0), ("Q5_1", 2), ("Q4_K", 0),
     ("Q5_K", 0), ("Q5_K", 2), ("Q6_K", 208)],
)  # fmt: skip
def test_scales_that_are_no_numbers_are_named(tmp_path, kind, at, value):
    raw, _ = encode(np.ones((2, 4, 512)), kind)
    raw[1, 2, at : at + 2] = np.array([value], dtype=np.float16).view(np.uint8)
    checkpoint = GgufCheckpoint([write(tmp_path / "x.gguf", {"w": (raw, kind)})])
    checkpoint.matrix("w", 0)
    with pytest.raises(LoadError, match=r"x\.gguf: tensor 'w': .*NaN or infinity.* is corrupt"):
        checkpoint.matrix("w", 1)


@pytest.mark.parametrize("kind", [*PLAIN, *K_TYPES])
def test_a_whole_file_is_a_model(tmp_path, kind):
    model = tiny_model("qwen3_moe", **SIZES)
    write_qwen3_moe(model, tmp_path / "model.gguf", kind)
    ours = ey.from_pretrained(tmp_path / "model.gguf", dtype=torch.float32, mode="exact")
    format = "fp32" if NATIVE[kind] in ("bf16", "fp16") else NATIVE[kind]  # the model's dtype
    assert {row.format for row in ey.verify(ours).layers} == {format}
    batch = prompts()
    close = 1e-4 if kind in EXACT else 0.03
    expected = logits(model, batch)
    difference = (logits(ours, batch) - expected).abs()
    assert difference.median() < close, difference.median()
    if kind in EXACT:
        assert torch.equal(greedy(ours, batch), greedy(model, batch))


def test_dense_layers_keep_their_codes(tmp_path):
    model = tiny_model("qwen3_moe", **SIZES)
    write_qwen3_moe(model, tmp_path / "model.gguf", "Q4_0", dense="Q8_0")
    ours = ey.from_pretrained(tmp_path / "model.gguf", dtype=torch.float32, mode="exact")
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    kept = [m.format for m in ours.modules() if isinstance(m, PackedLinear)]
    assert kept and set(kept) == {"int8-g32"}
    batch = prompts()
    torch.testing.assert_close(logits(ours, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


def test_transformers_own_loading_agrees(tmp_path):
    pytest.importorskip("accelerate")
    # the only size that its GGUF table gets right: it takes the default
    model = tiny_model("qwen3_moe", **{**SIZES, "moe_intermediate_size": 768})
    write_qwen3_moe(model, tmp_path / "model.gguf", "Q8_0")
    theirs = load(tmp_path, gguf_file="model.gguf")
    ours = ey.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32, mode="exact")
    batch = prompts()
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=1e-4, atol=1e-4)


def test_a_config_beside_the_file_is_used(tmp_path):
    model = tiny_model("qwen3_moe", **SIZES)
    save(model, tmp_path)
    write_qwen3_moe(model, tmp_path / "model.gguf", "Q8_0")
    ours = ey.from_pretrained(tmp_path / "model.gguf", dtype=torch.float32, mode="exact")
    assert ours.config.pad_token_id == 0
    batch = prompts()
    torch.testing.assert_close(logits(ours, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


def test_a_layer_in_two_types_gets_one_format_and_says_so(tmp_path):
    model = tiny_model("qwen3_moe", **SIZES)
    write_qwen3_moe(model, tmp_path / "model.gguf", "Q4_K", down="Q6_K")
    with pytest.warns(UserWarning, match="Not all experts are kept as they are: .*one format"):
        ours = ey.from_pretrained(tmp_path / "model.gguf", dtype=torch.float32, mode="exact")
    assert {row.format for row in ey.verify(ours).layers} == {"int8-g32"}
    batch = prompts()
    assert (logits(ours, batch) - logits(model, batch)).abs().median() < 0.03


def test_plain_experts_are_used_where_they_lie(tmp_path):
    from test_hf_memory import file_ranges, pointers

    model = tiny_model("qwen3_moe", **SIZES)
    write_qwen3_moe(model, tmp_path / "model.gguf", "BF16")
    ours = ey.from_pretrained(tmp_path / "model.gguf")
    ranges = file_ranges(tmp_path)
    for row in ey.verify(ours).layers:
        for pointer in pointers(ours.get_submodule(row.name).experts.parts[0].packed):
            assert any(low <= pointer < high for low, high in ranges)


def test_a_split_file_is_read_whole(tmp_path):
    values = np.ones((4, 64), dtype=np.float32)
    for part, name in enumerate("abc"):
        write(tmp_path / f"m-0000{part + 1}-of-00003.gguf", {name: (values * part, "F32")})
    files = gguf_files(tmp_path / "m-00002-of-00003.gguf")
    checkpoint = GgufCheckpoint(files)
    assert checkpoint.keys == ["a", "b", "c"]
    assert float(checkpoint.tensor("c")[0, 0]) == 2
    files[0].unlink()
    with pytest.raises(LoadError, match=r"m-00001-of-00003\.gguf: no such file, but m-00002"):
        gguf_files(files[1])


def test_a_missing_tensor_is_named(tmp_path):
    small = tiny_model("qwen3_moe", **{**SIZES, "num_hidden_layers": 1})
    big = tiny_model("qwen3_moe", **SIZES)
    write_qwen3_moe(small, tmp_path / "model.gguf")
    big.config.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"'blk\.1\.ffn_gate_exps\.weight' is missing"):
        ey.from_pretrained(tmp_path / "model.gguf")
    shutil.rmtree(tmp_path)


def test_a_wrong_shape_is_named(tmp_path):
    write_qwen3_moe(tiny_model("qwen3_moe", **SIZES), tmp_path / "model.gguf")
    tiny_model("qwen3_moe", **{**SIZES, "num_experts": 16}).config.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"ffn_gate_exps.weight': expected shape \[16, 256, 256\]"):
        ey.from_pretrained(tmp_path / "model.gguf")


def test_types_that_are_not_read_are_named(tmp_path):
    raw = np.zeros((8, 256 // 256 * 110), dtype=np.uint8)
    checkpoint = GgufCheckpoint([write(tmp_path / "x.gguf", {"w": (raw, "Q3_K")})])
    with pytest.raises(LoadError, match=r"x\.gguf: tensor 'w': Q3_K is not read, only"):
        checkpoint.format("w")
