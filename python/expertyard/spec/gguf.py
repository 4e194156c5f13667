# SPDX-License-Identifier: Apache-2.0
"""GGUF tensor names of a model's layers (llama.cpp), by the part of the layer that they hold.

blk.N.ffn_{gate,up,down}_exps <-> model.layers.N.mlp.experts, ffn_gate_inp <-> the router,
ffn_*_shexp <-> shared experts, attn_* <-> self_attn, token_embd, output_norm and output outside.
"""

from __future__ import annotations

from expertyard.spec.model import ModelSpec

OUTSIDE = {"token_embd.weight": "embedding", "output_norm.weight": "norm", "output.weight": "head"}

_GQA = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLA = ("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b", "attn_output")
_MLA_NORMS = ("attn_q_a_norm", "attn_kv_a_norm")
_PROJECTIONS = ("gate", "up", "down")
EXPERTS = tuple(f"ffn_{name}_exps" for name in _PROJECTIONS)


def layer_tensors(spec: ModelSpec, layer: int) -> tuple[tuple[str, str], ...]:
    """(GGUF name, part) of every tensor of a layer. Parts as in the module tree; "expert biases"
    go with the experts.
    """
    arch = spec.arch
    assert arch is not None
    names = [(f"{name}.weight", "norm") for name in ("attn_norm", "ffn_norm")]
    names += [(f"{name}.weight", "attention") for name in (_MLA if arch.is_mla else _GQA)]
    if arch.is_mla:
        names += [(f"{name}.weight", "norm") for name in _MLA_NORMS]
    if arch.qk_norm != "none":
        names += [(f"attn_{name}_norm.weight", "norm") for name in "qk"]
    if arch.qkv_bias and not arch.is_mla:
        names += [(f"attn_{name}.bias", "bias") for name in "qkv"]
    if arch.family.sinks:
        names.append(("attn_sinks.weight", "bias"))
    if not spec.layers[layer].is_moe:
        names += [(f"ffn_{name}.weight", "mlp") for name in _PROJECTIONS]
        return tuple((f"blk.{layer}.{name}", part) for name, part in names)
    names += [(f"{name}.weight", "experts") for name in EXPERTS]
    names += [("ffn_gate_inp.weight", "router"), ("exp_probs_b.bias", "router")]
    if arch.family.expert_bias:
        names += [(f"{name}.bias", "expert biases") for name in EXPERTS]
    if arch.shared_size:
        names += [(f"ffn_{name}_shexp.weight", "shared") for name in _PROJECTIONS]
    if arch.family.shared_gate:
        names.append(("ffn_gate_inp_shexp.weight", "shared"))
    return tuple((f"blk.{layer}.{name}", part) for name, part in names)
