# SPDX-License-Identifier: Apache-2.0
"""Writes weights in every layout that Expertyard reads. Not a test itself.

Each writer takes a float matrix [out, in] and returns (tensors by the suffix of the module's name,
the weight that these tensors stand for in float64): the truth comes from here and not from the
reader. GPTQ and AWQ are written by hand from their public descriptions.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Written = tuple[dict[str, Tensor], Tensor]


def fp8_blocks(w: Tensor, block: int = 128, name: str = "weight_scale_inv") -> Written:
    rows, columns = w.shape
    scales = torch.empty(-(-rows // block), -(-columns // block))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    truth = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = w[at].abs().max() / 448
            codes[at] = (w[at] / scales[i, j]).to(torch.float8_e4m3fn)
            truth[at] = codes[at].double() * scales[i, j].double()
    return {"weight": codes, name: scales}, truth


def fp8_channel(w: Tensor, name: str = "weight_scale") -> Written:
    scales = w.abs().amax(1, keepdim=True) / 448
    codes = (w / scales).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scales}, codes.double() * scales.double()


def _grouped(w: Tensor, group: int) -> Tensor:
    return w.float().unflatten(1, (-1, group))


def int_codes(w: Tensor, group: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """codes [out, in], scales fp16 [out, groups], zeros [out, groups], both codes from 0."""
    parts = _grouped(w, group)
    top = (1 << bits) - 1
    if symmetric:
        scales = (parts.abs().amax(-1) / (top // 2)).half()
        zeros = torch.full(scales.shape, (top + 1) // 2)
    else:
        low, high = parts.amin(-1), parts.amax(-1)
        scales = ((high - low) / top).half()
        zeros = (-low / scales.float()).round().clamp(1, top).int()
    codes = (parts / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, top).int().flatten(1), scales, zeros


def dequantised(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    group = codes.shape[1] // scales.shape[1]
    wide = [t.double().repeat_interleave(group, 1) for t in (scales, zeros)]
    return wide[0] * (codes.double() - wide[1])


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """[n, ...] -> int32 [n * bits / 32, ...], lowest bits first."""
    words = torch.zeros(codes.shape[0] * bits // 32, *codes.shape[1:], dtype=torch.int64)
    each = 32 // bits
    for place in range(each):
        words |= codes[place::each].long() << (bits * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq(
    w: Tensor,
    group: int = 128,
    bits: int = 4,
    symmetric: bool = True,
    version: int = 1,
    order: Tensor | None = None,
) -> Written:
    """order  [in]: act-order, the columns in the order in which groups take them"""
    columns = torch.arange(w.shape[1]) if order is None else order
    codes, scales, zeros = int_codes(w[:, columns], group, bits, symmetric)
    truth = torch.empty(w.shape, dtype=torch.float64)
    truth[:, columns] = dequantised(codes, scales, zeros)
    natural = torch.empty_like(codes)
    natural[:, columns] = codes
    groups = torch.empty(w.shape[1], dtype=torch.int32)
    groups[columns] = (torch.arange(w.shape[1]) // group).int()
    stored = zeros - (1 if version == 1 else 0)
    return {
        "qweight": pack_rows(natural.T, bits),
        "qzeros": pack_rows(stored, bits).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": groups,
    }, truth


def awq(w: Tensor, group: int = 128) -> Written:
    codes, scales, zeros = int_codes(w, group, 4, symmetric=False)

    def packed(values: Tensor) -> Tensor:  # [n, out] -> [n, out / 8]
        shuffled = values.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1)
        return pack_rows(shuffled.T, 4).T.contiguous()

    return {
        "qweight": packed(codes.T),
        "qzeros": packed(zeros.T),
        "scales": scales.T.contiguous(),
    }, dequantised(codes, scales, zeros)


def compressed(w: Tensor, group: int = 32, bits: int = 4, symmetric: bool = True) -> Written:
    """pack-quantized, by hand; test_sources compares it with the real library."""
    codes, scales, zeros = int_codes(w, group, bits, symmetric)
    tensors = {
        "weight_packed": pack_rows(codes.T, bits).T.contiguous(),
        "weight_scale": scales.to(torch.float16),
        "weight_shape": torch.tensor(w.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_rows(zeros, bits)
    return tensors, dequantised(codes, scales, zeros)


def int8_channel(w: Tensor) -> Written:
    scales = w.float().abs().amax(1, keepdim=True) / 127
    codes = (w / scales).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.double() * scales.double()


def mxfp4_codes(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes uint8 [..., groups, 32], exponent bytes [..., groups], truth like w."""
    parts = w.double().unflatten(-1, (-1, 32))
    exponents = (parts.abs().amax(-1).log2().floor() - 2 + 127).clamp(0, 254)
    scaled = parts * torch.exp2(127 - exponents)[..., None]
    codes = (scaled[..., None] - E2M1).abs().argmin(-1)
    truth = (E2M1[codes] * torch.exp2(exponents - 127)[..., None]).flatten(-2)
    return codes.to(torch.uint8), exponents.to(torch.uint8), truth


def gpt_oss(stacked: Tensor) -> Written:
    """[E, out, in] -> blocks and scales; the suffixes are those of the parameter's name."""
    codes, exponents, truth = mxfp4_codes(stacked)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return {"_blocks": blocks, "_scales": exponents}, truth


def compressed_config(group: int | None) -> dict[str, Any]:
    weights = {"num_bits": 4, "group_size": group, "strategy": "group"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


QUANT_CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
    "fp8-channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}},
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    },
    "compressed-tensors": compressed_config(32),
    "compressed-tensors-g64": compressed_config(64),
    "compressed-tensors-g128": compressed_config(128),
    "int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}},
    },
    "mxfp4": {"quant_method": "mxfp4"},
}

LAYOUTS: dict[str, Any] = {
    "fp8": fp8_blocks,
    "fp8-channel": fp8_channel,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed,
    "int8": int8_channel,
}
# the same layouts with other groups: for perplexities, not for every test
MORE_LAYOUTS: dict[str, Any] = {
    "compressed-tensors-g64": lambda w: compressed(w, 64),
    "compressed-tensors-g128": lambda w: compressed(w, 128),
}
FORMATS = {
    "fp8": "fp8",
    "fp8-channel": "fp8-channel",
    "gptq": "int4",
    "awq": "int4-g128-asym",
    "compressed-tensors": "int4-g32",
    "int8": "int8",
    "mxfp4": "mxfp4",
}


def requantise(folder: Path, out: Path, layout: str, dense: bool = False) -> Path:
    """A folder of plain weights, written again in a quantised layout; returns where the same
    numbers are in float32.

    dense  quantise the linear layers of attention too
    """
    out.mkdir()
    truth_folder = out.with_name(out.name + "-truth")
    truth_folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    stored: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    for key, value in tensors.items():
        expert = ".experts." in key and not key.endswith("bias")
        attention = dense and ".self_attn." in key and key.endswith("_proj.weight")
        truth[key] = value.float()
        if layout == "mxfp4" and expert:
            parts, exact = gpt_oss(value.transpose(1, 2).float())
            truth[key] = exact.transpose(1, 2).float()
            stored |= {key + suffix: part for suffix, part in parts.items()}
        elif layout != "mxfp4" and (expert or attention):
            parts, exact = {**LAYOUTS, **MORE_LAYOUTS}[layout](value.float())
            truth[key] = exact.float()
            stored |= {key.removesuffix("weight") + name: part for name, part in parts.items()}
        else:
            stored[key] = value
    names = sorted(stored)
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:])):
        save_file(
            {name: stored[name].contiguous() for name in part},
            out / f"model-{number + 1:05d}-of-00002.safetensors",
            metadata={"format": "pt"},
        )
    weight_map = {
        name: f"model-{1 + (number >= half):05d}-of-00002.safetensors"
        for number, name in enumerate(names)
    }
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(
        {key: value.contiguous() for key, value in truth.items()},
        truth_folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name and file.is_file():
            for to in (out, truth_folder):
                shutil.copy(file, to)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QUANT_CONFIGS[layout]
    (out / "config.json").write_text(json.dumps(config))
    return truth_folder
