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
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def layer_tensors(spec: ModelSpec, layer: int) -> tuple[tuple[str, str], ...]:
    """(GGUF name, part) of every tensor of a layer. Parts as in the module tree."""
    names: list[tuple[str, str]] = [("attn_norm", "norm"), ("ffn_norm", "norm")]
    mla = spec.arch is not None and spec.arch.is_mla
    names += [(name, "attention") for name in (_MLA if mla else _GQA)]
    if spec.layers[layer].is_moe:
        names += [(name, "experts") for name in EXPERTS]
        names.append(("ffn_gate_inp", "router"))
        if spec.arch is not None and spec.arch.shared_size:
            names += [(f"ffn_{name}_shexp", "shared") for name in ("gate", "up", "down")]
    else:
        names += [(f"ffn_{name}", "mlp") for name in ("gate", "up", "down")]
    return tuple((f"blk.{layer}.{name}.weight", part) for name, part in names)
