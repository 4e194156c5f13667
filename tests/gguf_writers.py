# SPDX-License-Identifier: Apache-2.0
"""Writes tiny GGUF models with the `gguf` package, which is llama.cpp's own writer. Not a test
itself.

The package quantises the plain types. K types are quantised here, by their public description;
blocks of Q5_K and Q6_K get random codes and scales where every bit must count. The package's own
dequantiser says what they all mean.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

PLAIN = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_TYPES = ("Q4_K", "Q5_K", "Q6_K")


def with_minima(values: np.ndarray, top: int) -> np.ndarray:
    """Q4_K (codes up to 15) and Q5_K (31). Superblocks of 256: fp16 d and dmin, eight 6-bit scales
    and minima in 12 bytes, for Q5_K the fifth bits (bit g of byte l: weight l of group g), nibbles.
    """
    groups = values.reshape(*values.shape[:-1], -1, 8, 32)
    low = np.minimum(groups.min(-1), 0)
    step = (groups.max(-1) - low) / top
    d, dmin = (x.max(-1, keepdims=True).astype(np.float16) for x in (step / 63, -low / 63))
    wide, wide_min = d.astype(np.float32), dmin.astype(np.float32)
    scale = np.rint(step / np.where(wide > 0, wide, 1)).clip(0, 63).astype(np.uint8)
    least = np.rint(-low / np.where(wide_min > 0, wide_min, 1)).clip(0, 63).astype(np.uint8)
    size = (wide * scale)[..., None]
    codes = np.rint((groups + (wide_min * least)[..., None]) / np.where(size > 0, size, 1))
    codes = codes.clip(0, top).astype(np.uint8)
    packed = np.zeros((*scale.shape[:-1], 12), dtype=np.uint8)
    packed[..., :4] = scale[..., :4] | (scale[..., 4:] >> 4 << 6)
    packed[..., 4:8] = least[..., :4] | (least[..., 4:] >> 4 << 6)
    packed[..., 8:] = (scale[..., 4:] & 15) | ((least[..., 4:] & 15) << 4)
    low_bits = codes & 15
    nibbles = (low_bits[..., 0::2, :] | (low_bits[..., 1::2, :] << 4)).reshape(
        *scale.shape[:-1], 128
    )
    places = np.arange(8, dtype=np.uint8)[:, None]
    fifth = [((codes >> 4) << places).sum(-2).astype(np.uint8)] if top == 31 else []
    parts = [d.view(np.uint8), dmin.view(np.uint8), packed, *fifth, nibbles]
    return np.concatenate(parts, axis=-1).reshape(*values.shape[:-1], -1)


def q6_k(values: np.ndarray) -> np.ndarray:
    """Superblocks of 256, w = d * scale * (code - 32): the codes' low nibbles, their two high bits,
    sixteen int8 scales, fp16 d. Each half of 128 is four runs of 32 side by side."""
    groups = values.reshape(*values.shape[:-1], -1, 16, 16)
    step = np.abs(groups).max(-1) / 31
    d = (step.max(-1, keepdims=True) / 127).astype(np.float16)
    wide = d.astype(np.float32)
    scale = np.rint(step / np.where(wide > 0, wide, 1)).clip(0, 127).astype(np.int8)
    size = (wide * scale)[..., None]
    codes = np.rint(groups / np.where(size > 0, size, 1)).clip(-32, 31) + 32
    runs = codes.astype(np.uint8).reshape(*scale.shape[:-1], 2, 4, 32)
    low = np.concatenate(
        [(runs[..., i, :] & 15) | ((runs[..., i + 2, :] & 15) << 4) for i in (0, 1)], axis=-1
    )
    high = sum((runs[..., i, :] >> 4) << (2 * i) for i in range(4)).astype(np.uint8)
    flat = [x.reshape(*scale.shape[:-1], -1) for x in (low, high)]
    parts = [*flat, scale.view(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts, axis=-1).reshape(*values.shape[:-1], -1)


# where a block has fp16 scales, by their byte
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


QUANTISERS = {
    "Q4_K": lambda values: with_minima(values, 15),
    "Q5_K": lambda values: with_minima(values, 31),
    "Q6_K": q6_k,
}


def encode(
    values: np.ndarray, type_name: str, seed: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(raw data, the float32 values that it stands for).

    seed  of Q5_K, Q6_K: random codes and scales, which use every bit; only the values' size is kept
    """
    kind = Type[type_name]
    values = np.ascontiguousarray(values, dtype=np.float32)
    if type_name in QUANTISERS and (seed is None or type_name == "Q4_K"):
        raw = QUANTISERS[type_name](values)
    elif type_name in K_TYPES:
        weights, width = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(seed)
        shape = (*values.shape[:-1], values.shape[-1] // weights, width)
        raw = rng.integers(0, 256, shape, dtype=np.uint8)
        size = {"Q4_K": 2000.0, "Q5_K": 4000.0, "Q6_K": 8000.0}[type_name]
        for at in _SCALES[type_name]:
            scales = rng.uniform(0.5, 1.0, (*shape[:-1], 1)) * values.std() / size * 10
            raw[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
        raw = raw.reshape(*values.shape[:-1], -1)
    else:
        raw = gguf.quants.quantize(values, kind)
    return raw, gguf.quants.dequantize(raw, kind).astype(np.float32)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_qwen3_moe(
    model: Any,
    path: Path,
    experts: str = "Q8_0",
    dense: str = "F32",
    down: str | None = None,
    random: bool = True,
) -> None:
    """Writes a Qwen3-MoE model; its own parameters become the numbers that the file holds.

    experts, dense  types; down: of the down projections, where it is another
    random          blocks of Q5_K and Q6_K are random ones (see encode)
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)

    def add(name: str, values: Any, kind: str, seed: int = 0) -> np.ndarray:
        raw, meant = encode(values.numpy(), kind, seed if random else None)
        writer.add_tensor(name, raw, raw_dtype=Type[kind])
        return meant

    state = model.state_dict()
    tied = config.tie_word_embeddings
    for name, value in state.items():
        value = value.float()
        if name in OUTSIDE:
            if name == "lm_head.weight" and tied:
                continue
            kind = dense if value.dim() == 2 else "F32"
            state[name].numpy()[:] = add(OUTSIDE[name], value, kind)
            continue
        words = name.split(".")
        block, rest = f"blk.{words[2]}", ".".join(words[3:])
        if rest == "mlp.experts.gate_up_proj":
            half = value.shape[1] // 2
            for part, rows, seed in (("gate", slice(0, half), 1), ("up", slice(half, None), 2)):
                meant = add(f"{block}.ffn_{part}_exps.weight", value[:, rows], experts, seed)
                state[name].numpy()[:, rows] = meant
        elif rest == "mlp.experts.down_proj":
            kind = down or experts
            state[name].numpy()[:] = add(f"{block}.ffn_down_exps.weight", value, kind, 3)
        else:
            kind = dense if value.dim() == 2 and rest != "mlp.gate.weight" else "F32"
            stem = rest.removesuffix(".weight")
            state[name].numpy()[:] = add(f"{block}.{NAMES[stem]}.weight", value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
