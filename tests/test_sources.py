# SPDX-License-Identifier: Apache-2.0
"""Every quantised layout is read as exactly the numbers that its writer meant."""

import pytest
import torch
from safetensors.torch import save_file

import checkpoint_writers as writers
from expertyard.errors import LoadError
from expertyard.loading import Checkpoint, read_quantised
from expertyard.quantize import QuantizedMatrix

ROWS, COLUMNS = 200, 384  # rows are no multiple of a block


def weight(rows=ROWS, columns=COLUMNS, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def write(path, tensors, module="layer"):
    joined = {
        f"{module}{'' if k.startswith('_') else '.'}{k}": v.contiguous() for k, v in tensors.items()
    }
    save_file({**joined, "norm.weight": torch.ones(3)}, path / "model.safetensors")
    return Checkpoint([path / "model.safetensors"])


def read(path, written, settings, key="layer.weight", expert=None):
    """The weight, and the checkpoint that it comes from."""
    checkpoint = write(path, written[0])
    read_quantised(checkpoint, settings)
    assert set(checkpoint.keys) == {key, "norm.weight"}
    matrix = checkpoint.matrix(key, expert)
    if isinstance(matrix, QuantizedMatrix):
        assert matrix.format.name == checkpoint.format(key)
        matrix = matrix.dequantize()
    return matrix, checkpoint


def assert_exact(path, written, settings, format, key="layer.weight"):
    got, checkpoint = read(path, written, settings, key)
    assert checkpoint.format(key) == format and not checkpoint.stored(key).loss
    assert checkpoint.shape(key) == (ROWS, COLUMNS)
    assert torch.equal(got, written[1])
    assert torch.equal(checkpoint.tensor(key), written[1].float())


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
@pytest.mark.parametrize("configured", [True, False])
def test_fp8_blocks(tmp_path, name, configured):
    settings = writers.QUANT_CONFIGS["fp8"] if configured else None
    assert_exact(tmp_path, writers.fp8_blocks(weight(), name=name), settings, "fp8")


def test_fp8_channels(tmp_path):
    settings = writers.QUANT_CONFIGS["fp8-channel"]
    assert_exact(tmp_path, writers.fp8_channel(weight()), settings, "fp8-channel")


def test_fp8_with_one_scale(tmp_path):
    tensors, _ = writers.fp8_blocks(weight(), block=1000)
    for shape in ((), (1,), (1, 1)):
        tensors["weight_scale_inv"] = tensors["weight_scale_inv"].reshape(shape)
        truth = tensors["weight"].double() * tensors["weight_scale_inv"].double()
        assert_exact(tmp_path, (tensors, truth), None, "fp8-channel")


def test_fp8_scales_as_powers_of_two(tmp_path):
    tensors, _ = writers.fp8_blocks(weight())
    exponents = torch.randint(100, 130, tensors["weight_scale_inv"].shape, dtype=torch.uint8)
    tensors["weight_scale_inv"] = exponents
    wide = torch.exp2(exponents.double() - 127).repeat_interleave(128, 0).repeat_interleave(128, 1)
    truth = tensors["weight"].double() * wide[:ROWS, :COLUMNS]
    assert_exact(tmp_path, (tensors, truth), None, "fp8")


def test_fp8_in_blocks_that_no_format_has_is_given_as_numbers(tmp_path):
    written = writers.fp8_blocks(weight(), block=64)
    settings = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    got, checkpoint = read(tmp_path, written, settings)
    torch.testing.assert_close(got.double(), written[1], rtol=1e-6, atol=0)
    assert checkpoint.format("layer.weight") == "bf16"
    assert "64 x 64" in checkpoint.stored("layer.weight").loss


@pytest.mark.parametrize("columns", [384, 320])
def test_fused_fp8_experts(tmp_path, columns):
    each = [writers.fp8_blocks(weight(columns=columns, seed=e)) for e in range(3)]
    tensors = {
        "": torch.stack([tensors["weight"] for tensors, _ in each]),
        "_scale_inv": torch.stack([tensors["weight_scale_inv"] for tensors, _ in each]),
    }
    save_file({f"gate_up_proj{k}": v for k, v in tensors.items()}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint([tmp_path / "m.safetensors"])
    read_quantised(checkpoint, writers.QUANT_CONFIGS["fp8"])
    assert checkpoint.shape("gate_up_proj") == (3, ROWS, columns)
    for expert, (_, truth) in enumerate(each):
        assert torch.equal(checkpoint.matrix("gate_up_proj", expert).dequantize(), truth)


@pytest.mark.parametrize("configured", [True, False])
def test_mxfp4(tmp_path, configured):
    stacked = torch.stack([weight(seed=e) for e in range(3)])
    tensors, truth = writers.gpt_oss(stacked)
    checkpoint = write(tmp_path, tensors, module="mlp.experts.gate_up_proj")
    read_quantised(checkpoint, writers.QUANT_CONFIGS["mxfp4"] if configured else None)
    assert checkpoint.shape("mlp.experts.gate_up_proj") == (3, ROWS, COLUMNS)
    assert checkpoint.format("mlp.experts.gate_up_proj") == "mxfp4"
    for expert in range(3):
        matrix = checkpoint.matrix("mlp.experts.gate_up_proj", expert)
        assert torch.equal(matrix.dequantize(), truth[expert])


@pytest.mark.parametrize("group", [32, 64, 128, 384])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(tmp_path, group, symmetric, version):
    settings = {
        **writers.QUANT_CONFIGS["gptq"],
        "group_size": -1 if group == 384 else group,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    written = writers.gptq(weight(), group, symmetric=symmetric, version=version)
    native = {32: "int4-g32", 64: "int4-g64", 128: "int4", 384: "int4"}[group]
    if not symmetric:
        native = {"int4": "int4-g128"}.get(native, native) + "-asym"
    assert_exact(tmp_path, written, settings, native)


def test_gptq_with_8_bits(tmp_path):
    settings = {**writers.QUANT_CONFIGS["gptq"], "bits": 8}
    assert_exact(tmp_path, writers.gptq(weight(), bits=8), settings, "int8-g128")


def test_gptq_without_a_config_is_told_by_its_shapes(tmp_path):
    assert_exact(tmp_path, writers.gptq(weight()), None, "int4")


def test_act_order_is_given_as_numbers_and_said(tmp_path):
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))
    written = writers.gptq(weight(), order=order)
    settings = {**writers.QUANT_CONFIGS["gptq"], "desc_act": True}
    got, checkpoint = read(tmp_path, written, settings)
    torch.testing.assert_close(got.double(), written[1], rtol=1e-6, atol=0)
    assert "act-order" in checkpoint.stored("layer.weight").loss


def test_act_order_that_the_config_denies_is_an_error(tmp_path):
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))
    checkpoint = write(tmp_path, writers.gptq(weight(), order=order)[0])
    read_quantised(checkpoint, writers.QUANT_CONFIGS["gptq"])
    with pytest.raises(
        LoadError, match=r"model.safetensors: tensor 'layer.g_idx': is not in order"
    ):
        checkpoint.matrix("layer.weight")


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("configured", [True, False])
def test_awq(tmp_path, group, configured):
    settings = {**writers.QUANT_CONFIGS["awq"], "group_size": group} if configured else None
    format = f"int4-g{group}-asym"
    assert_exact(tmp_path, writers.awq(weight(), group), settings, format)


@pytest.mark.parametrize("group", [32, 64, 128, 384])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_int4(tmp_path, group, symmetric):
    written = writers.compressed(weight(), group, symmetric=symmetric)
    native = f"int4-g{128 if group == 384 else group}" + ("" if symmetric else "-asym")
    native = "int4" if native == "int4-g128" else native
    for settings in (writers.compressed_config(group), writers.compressed_config(None), None):
        assert_exact(tmp_path, written, settings, native)


def test_compressed_tensors_int8(tmp_path):
    assert_exact(tmp_path, writers.int8_channel(weight()), writers.QUANT_CONFIGS["int8"], "int8")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_files_of_the_compressed_tensors_library(tmp_path, symmetric, group):
    """The real writer: its compressor packs, its dequantiser says what the weight is."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    assert library
    codes, scales, zeros = writers.int_codes(weight(), group, 4, symmetric)
    args = QuantizationArgs(num_bits=4, group_size=group, symmetric=symmetric, strategy="group")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    signed = (codes - 8).to(torch.int8)
    zero = (zeros - 8).to(torch.int8)
    values = {"weight": dequantize(signed, scales, zero, args), "weight_scale": scales}
    if not symmetric:
        values["weight_zero_point"] = zero
    tensors = PackedQuantizationCompressor.compress(values, scheme)
    truth = writers.dequantised(codes, scales, zeros)
    got, checkpoint = read(tmp_path, (dict(tensors), truth), writers.compressed_config(group))
    assert torch.equal(got, truth)
    assert checkpoint.format("layer.weight").startswith("int4")


def test_scales_for_activations_are_left_out(tmp_path):
    tensors, truth = writers.fp8_blocks(weight())
    tensors["input_scale"] = torch.ones(1)
    assert_exact(tmp_path, (tensors, truth), writers.QUANT_CONFIGS["fp8"], "fp8")


@pytest.mark.parametrize("method", ["bitsandbytes", "aqlm", "modelopt"])
def test_a_method_that_is_not_read_is_named(tmp_path, method):
    checkpoint = write(tmp_path, {"weight": weight()})
    with pytest.raises(LoadError, match=f"quant_method '{method}' is not read by Expertyard"):
        read_quantised(checkpoint, {"quant_method": method})


def test_a_config_that_claims_what_no_tensor_is(tmp_path):
    checkpoint = write(tmp_path, {"weight": weight()})
    with pytest.raises(LoadError, match=r"says that the checkpoint is quantised \(fp8\), but no"):
        read_quantised(checkpoint, writers.QUANT_CONFIGS["fp8"])


def test_unquantised_files_are_left_alone(tmp_path):
    checkpoint = write(tmp_path, {"weight": weight()})
    assert read_quantised(checkpoint, None) == ""
    assert checkpoint.format("layer.weight") == "fp32"
