# SPDX-License-Identifier: Apache-2.0
"""Families of mixture-of-experts models as data: one entry a family, no code.

An entry says how the modules of transformers 5 are called in that family, which class each has, and
under which other names the same module is known (the checkpoint, older transformers, KTransformers'
own modelling files), so that a rule written for any of them finds it. Sizes come from config.json.
"""

from dataclasses import dataclass, field

from expertyard.errors import SpecError


@dataclass(frozen=True)
class Family:
    """One family. Class names are `prefix` + the field, unless they start with '='."""

    model_types: tuple[str, ...]
    prefix: str
    attention: str = "gqa"  # gqa | mla
    block: str = "mlp"  # the MoE block's attribute in a decoder layer
    block_alias: str = ""
    block_class: str = "SparseMoeBlock"
    experts_class: str = "Experts"
    router: str = "gate"
    router_class: str = "TopKRouter"
    router_bias: bool = False
    router_below: tuple[str, str] = ("", "")  # (name, class) of a module with its correction bias
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""  # shared_expert | shared_experts in the block, or shared_mlp beside it
    shared_gate: bool = False
    mlp: str = "mlp"  # a dense layer's MLP
    mlp_class: str = "MLP"
    attention_class: str = "Attention"
    layer_class: str = "DecoderLayer"
    mixer: str = ""  # kind of the layers without attention (mixers.py)
    mixer_layer_class: str = ""  # a layer's class there, where it is another
    model_class: str = "Model"
    root_class: str = "ForCausalLM"
    norm_class: str = "RMSNorm"
    norm_bias: bool = False
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    final_norm: str = "norm"
    rotary_class: str = "RotaryEmbedding"  # "": the model has none
    qkv_bias: str = "attention_bias"  # config key that switches it; a leading "=" is a fixed value
    o_bias: str = "=0"
    qk_norm: str = "=none"  # none | head | full, or a config key that switches "head" on
    gated_attention: bool = False  # q_proj makes a gate as well
    head_bias: str = "=0"
    sinks: bool = False
    expert_bias: bool = False
    activation: str = ""  # overrides hidden_act
    old_classes: dict[str, tuple[str, ...]] = field(
        default_factory=dict, compare=False
    )  # part -> other names


FAMILIES: tuple[Family, ...] = (
    Family(
        ("mixtral",),
        "Mixtral",
        block_alias="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        old_classes={"mlp": ("MixtralBlockSparseTop2MLP", "MixtralBLockSparseTop2MLP")},
    ),
    Family(
        ("qwen2_moe",), "Qwen2Moe", shared="shared_expert", shared_gate=True, qkv_bias="qkv_bias=1"
    ),
    Family(("qwen3_moe", "qwen3_vl_moe_text", "qwen3_vl_moe"), "Qwen3Moe", qk_norm="=head"),
    Family(("olmoe",), "Olmoe", qk_norm="=full"),
    Family(
        ("deepseek_v2",),
        "DeepseekV2",
        attention="mla",
        block_class="Moe",
        router_class="TopkRouter",
        shared="shared_experts",
        old_classes={
            "block": ("DeepseekV2MoE",),
            "router": ("MoEGate",),
            "rotary": ("DeepseekV2YarnRotaryEmbedding",),
        },
    ),
    Family(
        ("deepseek_v3", "kimi_k2"),
        "DeepseekV3",
        attention="mla",
        block_class="MoE",
        router_class="TopkRouter",
        shared="shared_experts",
        old_classes={"router": ("MoEGate",), "rotary": ("DeepseekV3YarnRotaryEmbedding",)},
    ),
    Family(
        ("glm4_moe", "glm4v_moe_text", "glm4v_moe"),
        "Glm4Moe",
        block_class="MoE",
        router_class="TopkRouter",
        shared="shared_experts",
        qk_norm="use_qk_norm",
    ),
    Family(
        ("gpt_oss",),
        "GptOss",
        block_class="MLP",
        router="router",
        router_bias=True,
        qkv_bias="attention_bias=1",
        o_bias="attention_bias=1",
        sinks=True,
        expert_bias=True,
        activation="swigluoai",
    ),
    Family(
        ("minimax_m2", "minimax"),
        "MiniMaxM2",
        block_alias="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        qk_norm="=full",
    ),
    Family(
        ("llama4_text", "llama4"),
        "Llama4Text",
        block="feed_forward",
        block_class="Moe",
        root_class="=Llama4ForCausalLM",
        router="router",
        router_class="=Llama4Router",
        shared="shared_expert",
        mlp="feed_forward",
        o_bias="attention_bias",
        qkv_bias="attention_bias",
    ),
    Family(
        ("qwen3_next",),
        "Qwen3Next",
        shared="shared_expert",
        shared_gate=True,
        qk_norm="=head",
        gated_attention=True,
        mixer="delta net",
    ),
    Family(
        ("qwen3_5_moe_text", "qwen3_5_moe"),
        "Qwen3_5Moe",
        shared="shared_expert",
        shared_gate=True,
        qk_norm="=head",
        gated_attention=True,
        mixer="split delta net",
        model_class="TextModel",
        rotary_class="TextRotaryEmbedding",
    ),
    Family(
        ("kimi_linear",),
        "KimiLinear",
        attention="mla",
        block_class="MoE",
        router_class="TopkRouter",
        shared="shared_experts",
        mixer="kimi delta",
        rotary_class="",
        block_alias="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    ),
    Family(
        ("jamba",),
        "Jamba",
        block="feed_forward",
        router="router",
        mlp="feed_forward",
        mixer="mamba",
        layer_class="AttentionDecoderLayer",
        mixer_layer_class="MambaDecoderLayer",
        norms=("input_layernorm", "pre_ff_layernorm"),
        final_norm="final_layernorm",
        rotary_class="",
    ),
    Family(
        ("granitemoe",), "GraniteMoe", block="block_sparse_moe", block_class="MoE", router="router",
        qkv_bias="attention_bias", o_bias="attention_bias",
    ),
    Family(
        ("granitemoeshared",), "GraniteMoeShared", block="block_sparse_moe", block_class="MoE",
        router="router", shared="shared_mlp", qkv_bias="attention_bias", o_bias="attention_bias",
    ),
    Family(
        ("granitemoehybrid",), "GraniteMoeHybrid", block="block_sparse_moe", block_class="MoE",
        router="router", shared="shared_mlp", mixer="mamba2", rotary_class="",
        qkv_bias="attention_bias", o_bias="attention_bias",
    ),
    Family(
        ("phimoe",), "Phimoe", block_alias="block_sparse_moe", router="router",
        projections=("w1", "w3", "w2"), norm_class="=LayerNorm", norm_bias=True,
        o_bias="attention_bias", head_bias="lm_head_bias",
    ),
    Family(
        ("ernie4_5_moe",), "Ernie4_5_Moe", shared="shared_experts", qkv_bias="use_bias",
        o_bias="use_bias", router_below=("moe_statics", "=Ernie4_5_MoeStatics"),
    ),
    Family(
        ("exaone_moe",), "ExaoneMoe", block_class="SparseMoEBlock", router_class="TopkRouter",
        shared="shared_experts", qk_norm="=head",
    ),
    Family(
        ("glm4_moe_lite",), "Glm4MoeLite", attention="mla", block_class="MoE",
        router_class="TopkRouter", shared="shared_experts",
    ),
    Family(
        ("solar_open",), "SolarOpen", block_class="MoE", router_class="TopkRouter",
        shared="shared_experts",
    ),
)  # fmt: skip

# For a model_type that is not above but whose config has experts: the layout that most families
# have.
GENERIC = Family(
    ("",), "", attention="gqa", shared="shared_experts", block_alias="block_sparse_moe"
)


def find_family(model_type: str) -> Family | None:
    """The entry for a config's model_type, or None."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    return None


def class_name(family: Family, suffix: str) -> str:
    """'Experts' -> 'Qwen3MoeExperts'; '=Llama4Router' -> 'Llama4Router'."""
    return suffix[1:] if suffix.startswith("=") else family.prefix + suffix


def switch(setting: str, config: dict[str, object]) -> bool:
    """Value of a yes/no field: '=1' is fixed, 'key' or 'key=1' is config[key] with its default."""
    key, _, default = setting.partition("=")
    if not key:
        return default == "1"
    value = config.get(key)
    if value is None:
        return default == "1"
    if not isinstance(value, bool | int):
        raise SpecError(f"config.json: {key}: expected true or false, got {value!r}.")
    return bool(value)
