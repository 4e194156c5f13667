# SPDX-License-Identifier: Apache-2.0
"""The numbers of a config.json that placement needs, under one name each. Checked once, here.

Families name the same thing differently (n_routed_experts, num_local_experts, num_experts); the
lists below are those names, the first one found counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertyard.errors import SpecError
from expertyard.spec.families import GENERIC, Family, class_name, find_family, switch
from expertyard.spec.mixers import Mixer, read_mixer
from expertyard.spec.model import ExpertShape

NUM_EXPERTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "moe_num_primary_experts",
)  # fmt: skip
TOP_K = (
    "moe_num_active_primary_experts",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "top_k_experts",
    "moe_top_k",
)
EXPERT_SIZE = (
    "moe_ffn_hidden_size",
    "moe_intermediate_size",
    "expert_intermediate_size",
    "expert_ffn_hidden_size",
    "intermediate_size",
    "ffn_hidden_size",
)
MAX_LAYERS = 10_000  # far above any model; a larger number is a broken file
MAX_SIZE = 1 << 40


@dataclass(frozen=True)
class Arch:
    """Sizes of one model. MLA fields are 0 for ordinary attention."""

    family: Family
    model_type: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_lora_rank: int
    kv_lora_rank: int
    rope_head_dim: int
    dense_size: int  # intermediate_size of a dense layer's MLP
    shared_size: int  # intermediate_size of the shared experts together; 0 = none
    experts: ExpertShape
    is_moe: tuple[bool, ...]
    windows: tuple[int | None, ...]
    mixes: tuple[bool, ...]  # layers that have the mixer instead of attention
    mixer: Mixer | None
    head_bias: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: str
    tie_word_embeddings: bool
    prefix: str  # "model." or "model.language_model."
    vision: Vision | None

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank > 0

    @property
    def kv_elements(self) -> int:
        """Cached elements per token and layer: K and V heads, or MLA's compressed vector."""
        if self.is_mla:
            return self.kv_lora_rank + self.rope_head_dim
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)

    def layer_state(self, layer: int) -> tuple[int, int | None]:
        """(elements cached, for how many tokens at most): a mixer keeps one state, whatever the
        context.
        """
        if self.mixer is not None and self.mixes[layer]:
            return self.mixer.state, 1
        return self.kv_elements, self.windows[layer]


@dataclass(frozen=True)
class Vision:
    """The vision tower's sizes, enough for an estimate of its bytes."""

    num_layers: int
    hidden_size: int
    intermediate_size: int


class Reader:
    """Typed reads from a config dict; every complaint names the file, the key and the value."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def number(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        for key in keys:
            value = self.config.get(key)
            if isinstance(value, list) and value and all(item == value[0] for item in value):
                value = value[0]  # one number a layer, all alike (HunYuan)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise SpecError(f"{self.where}: {key}: expected a whole number, got {value!r}.")
            if not least <= value <= MAX_SIZE:
                raise SpecError(f"{self.where}: {key}: expected at least {least}, got {value}.")
            return value
        if default is not None:
            return default
        hint = difflib.get_close_matches(keys[0], list(map(str, self.config)), 1)
        near = f" The nearest key there is {hint[0]!r}." if hint else ""
        raise SpecError(f"{self.where}: {' or '.join(keys)} is missing.{near}")

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        return default if value is None else bool(value)

    def nested(self, key: str) -> Reader:
        """A reader of this config with the mapping under `key`, where there is one, over it."""
        inner = self.config.get(key)
        if not isinstance(inner, Mapping):
            return self
        return Reader({**self.config, **inner}, f"{self.where}: {key}")

    def numbers(self, key: str) -> list[int] | None:
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise SpecError(
                f"{self.where}: {key}: expected a list of layer numbers, got {value!r}."
            )
        return value

    def words(self, key: str, length: int) -> list[str] | None:
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise SpecError(f"{self.where}: {key}: expected a list of words, got {value!r}.")
        if len(value) < length:
            raise SpecError(
                f"{self.where}: {key}: expected {length} entries, one a layer, got {len(value)}."
            )
        return value


def read_arch(config: Mapping[str, Any], where: str) -> Arch:
    """The numbers of one config. Raises SpecError that names file, key and value."""
    outer = config
    text = next((config[key] for key in ("text_config", "llm_config") if config.get(key)), None)
    if text is not None:
        if not isinstance(text, Mapping):
            raise SpecError(f"{where}: text_config: expected a mapping, got {text!r}.")
        config = text
    model_type = str(config.get("model_type") or outer.get("model_type") or "")
    family = find_family(model_type) or GENERIC
    for part in ("attn_config", "ffn_config"):  # DBRX
        if isinstance(own := config.get(part), Mapping):
            config = {**own, "hidden_size": None, **config}  # the model's is d_model
    read = Reader(config, where)

    num_layers = read.number(
        "num_hidden_layers", "n_layer", "num_layers", "n_layers", default=_listed_layers(read)
    )
    if num_layers > MAX_LAYERS:
        raise SpecError(
            f"{where}: num_hidden_layers: expected at most {MAX_LAYERS}, got {num_layers}."
        )
    hidden_size = read.number("hidden_size", "n_embd", "d_model")
    num_heads = read.number("num_attention_heads", "n_head", "n_heads")
    kv_lora_rank = read.number("kv_lora_rank", default=0, least=0)
    head_dim = read.number("head_dim", default=0, least=0) or hidden_size // num_heads or 1
    rope_head_dim = 0
    v_head_dim = head_dim
    if kv_lora_rank:
        rope_head_dim = read.number("qk_rope_head_dim", least=0)
        head_dim = read.number("qk_nope_head_dim") + rope_head_dim
        v_head_dim = read.number("v_head_dim")

    experts = _read_experts(read, family, hidden_size, model_type, where)
    is_moe = _moe_layers(read, num_layers)
    mixes = _mixing_layers(read, num_layers) if family.mixer else (False,) * num_layers
    if not any(is_moe):
        raise SpecError(f"{where}: none of the {num_layers} layers is a mixture of experts.")
    return Arch(
        family=family,
        model_type=model_type,
        architecture=_architecture(outer, family),
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=read.number("vocab_size"),
        num_heads=num_heads,
        num_kv_heads=read.number("num_key_value_heads", "kv_n_heads", default=num_heads),
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        q_lora_rank=read.number("q_lora_rank", default=0, least=0),
        kv_lora_rank=kv_lora_rank,
        rope_head_dim=rope_head_dim,
        dense_size=read.number(
            "intermediate_size_mlp", "intermediate_size", default=experts.intermediate_size
        ),
        shared_size=_shared_size(read, family, experts),
        experts=experts,
        is_moe=is_moe,
        windows=_windows(read, num_layers),
        mixes=mixes,
        mixer=read_mixer(family.mixer, read, hidden_size) if any(mixes) else None,
        head_bias=switch(family.head_bias, dict(config)),
        qkv_bias=switch(family.qkv_bias, dict(config)),
        o_bias=switch(family.o_bias, dict(config)),
        qk_norm=_qk_norm(family, config),
        tie_word_embeddings=bool(
            config.get("tie_word_embeddings", outer.get("tie_word_embeddings", False))
        ),
        prefix="model.language_model." if text is not None else "model.",
        vision=_vision(outer, where),
    )


def _read_experts(
    read: Reader, family: Family, hidden_size: int, model_type: str, where: str
) -> ExpertShape:
    if not any(read.config.get(key) for key in NUM_EXPERTS):
        raise SpecError(
            f"{where}: this is not a mixture-of-experts model that Expertyard knows: model_type is "
            f"{model_type!r} and none of {', '.join(NUM_EXPERTS)} is there."
        )
    num_experts = read.number(*NUM_EXPERTS)
    top_k = read.number(*TOP_K)
    if top_k > num_experts:
        raise SpecError(
            f"{where}: a token chooses {top_k} experts, but a layer has {num_experts} only."
        )
    names = ("hidden_act", "hidden_activation", "mlp_hidden_act")
    named = next((read.config[name] for name in names if read.config.get(name)), "silu")
    activation = family.activation or str(named)
    return ExpertShape(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=read.number("moe_latent_size", "moe_hidden_size", default=hidden_size),
        intermediate_size=read.number(*EXPERT_SIZE),
        activation=activation,
        bias=family.expert_bias,
    )


def _listed_layers(read: Reader) -> int | None:
    """Layers of a config that lists them instead of counting them (Nemotron-H)."""
    listed = read.config.get("layers_block_type") or read.config.get("hybrid_override_pattern")
    return len(listed) if isinstance(listed, list | str) else None


def _moe_layers(read: Reader, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts; the first key found in the config decides."""
    layers = range(num_layers)
    types = read.words("mlp_layer_types", num_layers)
    if types is not None:
        return tuple(types[layer] != "dense" for layer in layers)
    kinds = read.words("layers_block_type", num_layers)
    if kinds is not None and "moe" in kinds:
        return tuple(kinds[layer] == "moe" for layer in layers)
    if isinstance(pattern := read.config.get("hybrid_override_pattern"), str):
        return tuple(pattern[layer : layer + 1] == "E" for layer in layers)
    moe_layers = read.numbers("moe_layers")
    if moe_layers is not None:
        return tuple(layer in set(moe_layers) for layer in layers)
    if read.config.get("interleave_moe_layer_step") is not None:
        step = read.number("interleave_moe_layer_step")
        return tuple((layer + 1) % step == 0 for layer in layers)
    if read.config.get("moe_layer_start_index") is not None:
        first = read.number("moe_layer_start_index", least=0)
        every = read.number("moe_layer_interval", default=1)
        last = read.config.get("moe_layer_end_index")
        last = last if isinstance(last, int) and last >= 0 else num_layers - 1
        return tuple(first <= layer <= last and (layer + 1) % every == 0 for layer in layers)
    if read.config.get("expert_layer_period") is not None:
        every, offset = (
            read.number("expert_layer_period"),
            read.number("expert_layer_offset", least=0),
        )
        return tuple(layer % every == offset % every for layer in layers)
    dense_first = read.number("first_k_dense_replace", "num_dense_layers", default=0, least=0)
    freq = read.config.get("moe_layer_freq", 1)
    every = freq if type(freq) is int and freq > 0 else 1
    step = read.number("decoder_sparse_step", default=1)
    mlp_only = set(read.numbers("mlp_only_layers") or ())
    return tuple(
        layer >= dense_first
        and layer % every == 0
        and (layer + 1) % step == 0
        and layer not in mlp_only
        for layer in layers
    )


def _mixing_layers(read: Reader, num_layers: int) -> tuple[bool, ...]:
    """Which layers have no attention; the first key found in the config decides."""
    layers = range(num_layers)
    types = read.words("layer_types", num_layers)
    if types is not None:
        return tuple(types[layer] in ("linear_attention", "mamba") for layer in layers)
    linear = read.nested("linear_attn_config").numbers("full_attn_layers")
    if linear is not None:  # counted from 1
        return tuple(layer + 1 not in set(linear) for layer in layers)
    if read.config.get("full_attention_interval") is not None:
        every = read.number("full_attention_interval")
        return tuple((layer + 1) % every != 0 for layer in layers)
    if read.config.get("attn_layer_period") is not None:
        every, offset = read.number("attn_layer_period"), read.number("attn_layer_offset", least=0)
        return tuple(layer % every != offset % every for layer in layers)
    return (False,) * num_layers


def _shared_size(read: Reader, family: Family, experts: ExpertShape) -> int:
    if family.shared == "shared_expert" and family.prefix == "Llama4Text":
        return experts.intermediate_size
    size = read.number(
        "shared_expert_intermediate_size", "shared_intermediate_size", default=0, least=0
    )
    if size:
        return size
    number = read.number(
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert",
        default=0, least=0,
    )  # fmt: skip
    return number * experts.intermediate_size


def _windows(read: Reader, num_layers: int) -> tuple[int | None, ...]:
    """Tokens that each layer's cache keeps at most; layer_types says which are limited."""
    types = read.config.get("layer_types")
    limits = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    if not isinstance(types, list) or len(types) < num_layers:
        types = _implied_types(read, num_layers)
    windows: list[int | None] = []
    for kind in types[:num_layers]:
        size = read.config.get(limits.get(str(kind), ""))
        windows.append(size if type(size) is int and size > 0 else None)
    return tuple(windows)


def _implied_types(read: Reader, num_layers: int) -> list[str]:
    """Llama-4's published configs give the pattern by no_rope_layers or an interval only."""
    if not read.config.get("attention_chunk_size"):
        return ["full_attention"] * num_layers
    every = read.number("no_rope_layer_interval", default=4)
    return [
        "full_attention" if (layer + 1) % every == 0 else "chunked_attention"
        for layer in range(num_layers)
    ]


def _qk_norm(family: Family, config: Mapping[str, Any]) -> str:
    if family.qk_norm.startswith("="):
        return family.qk_norm[1:]
    return "head" if switch(family.qk_norm, dict(config)) else "none"


def _architecture(config: Mapping[str, Any], family: Family) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    return class_name(family, family.root_class)


def _vision(config: Mapping[str, Any], where: str) -> Vision | None:
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping) or not vision:
        return None
    read = Reader(vision, f"{where}: vision_config")
    layers = read.number("num_hidden_layers", "depth", "num_layers", default=0, least=0)
    hidden = read.number("hidden_size", "embed_dim", "width", default=0, least=0)
    if not layers or not hidden:
        return None
    return Vision(layers, hidden, read.number("intermediate_size", default=4 * hidden))
