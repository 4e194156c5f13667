# SPDX-License-Identifier: Apache-2.0
"""A model's module tree as data: names, classes and parameter shapes, without torch.

The tree is transformers 5's. Modules that only older layouts have (a rotary embedding in every
attention) are there too, marked legacy, so that rules written for those layouts find them. The
experts of a layer are one module; single experts are named by `expert_names`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from expertyard.spec.arch import Arch
from expertyard.spec.families import class_name
from expertyard.spec.model import Module, Shape


@lru_cache(maxsize=8)
def build_tree(arch: Arch) -> tuple[Module, ...]:
    """Every module, depth first, parents before children, root first."""
    return tuple(_modules(arch))


def expert_names(module: Module, expert: int) -> tuple[str, ...]:
    """Names of one expert in layouts where experts are modules."""
    return tuple(f"{name}.{expert}" for name in module.names)


def _modules(arch: Arch) -> Iterator[Module]:
    family, base = arch.family, arch.prefix[:-1]
    yield Module("", (arch.architecture, "PreTrainedModel", "Module"), "root")
    yield Module(
        base, (class_name(family, family.model_class), *old(arch, "model"), "Module"), "model",
        aliases=("model", "language_model.model") if base != "model" else (),
    )  # fmt: skip
    top = _Names(arch, base)
    hidden = arch.hidden_size
    yield top.module(
        "embed_tokens", ("Embedding",), "embedding", shapes=((arch.vocab_size, hidden),)
    )
    yield top.module("layers", ("ModuleList",), "list")
    for layer in range(arch.num_layers):
        yield from _layer(arch, layer)
    yield top.module(family.final_norm, _norm(arch), "norm", _norm_shapes(arch, hidden))
    if family.rotary_class:
        yield top.module("rotary_emb", _rotary(arch), "rotary")
    if arch.vision is not None:
        yield _vision(arch)
    head: tuple[Shape, ...] = () if arch.tie_word_embeddings else ((arch.vocab_size, hidden),)
    if head and arch.head_bias:
        head += ((arch.vocab_size,),)
    aliases = ("language_model.lm_head",) if base != "model" else ()
    yield Module("lm_head", ("Linear", "Module"), "head", shapes=head, aliases=aliases)


class _Names:
    """Makes modules below one parent; a parent's other names give the children theirs."""

    def __init__(self, arch: Arch, parent: str, layer: int | None = None, alias: str = "") -> None:
        self.parent = parent
        self.layer = layer
        parents = [alias] if alias else []
        if arch.prefix != "model.":
            # the text model alone, and older multimodal layouts, have no language_model in the path
            parents += [
                name.replace(arch.prefix[:-1], older, 1)
                for older in ("model", "language_model.model")
                for name in (parent, *parents)
            ]
        self.parents = tuple(parents)

    def module(
        self,
        name: str,
        classes: tuple[str, ...],
        part: str,
        shapes: tuple[Shape, ...] = (),
        legacy: bool = False,
    ) -> Module:
        return Module(
            f"{self.parent}.{name}",
            (*classes, "Module"),
            part,
            self.layer,
            shapes,
            tuple(f"{parent}.{name}" for parent in self.parents),
            legacy,
        )

    def linear(
        self, name: str, part: str, out_size: int, in_size: int, bias: bool = False
    ) -> Module:
        shapes: tuple[Shape, ...] = (
            ((out_size, in_size), (out_size,)) if bias else ((out_size, in_size),)
        )
        return self.module(name, ("Linear",), part, shapes)


def old(arch: Arch, part: str) -> tuple[str, ...]:
    return arch.family.old_classes.get(part, ())


def _norm(arch: Arch) -> tuple[str, ...]:
    return (class_name(arch.family, arch.family.norm_class),)


def _norm_shapes(arch: Arch, size: int) -> tuple[Shape, ...]:
    return ((size,), (size,)) if arch.family.norm_bias else ((size,),)


def _rotary(arch: Arch) -> tuple[str, ...]:
    return (class_name(arch.family, arch.family.rotary_class), *old(arch, "rotary"))


def _layer(arch: Arch, layer: int) -> Iterator[Module]:
    family = arch.family
    here = f"{arch.prefix}layers.{layer}"
    in_list = _Names(arch, f"{arch.prefix}layers", layer)
    mixes = arch.mixer is not None and arch.mixes[layer]
    layer_class = (mixes and family.mixer_layer_class) or family.layer_class
    yield in_list.module(str(layer), (class_name(family, layer_class),), "layer")
    names = _Names(arch, here, layer)
    yield from _mixer(arch, layer, names) if mixes else _attention(arch, layer, names)
    if arch.is_moe[layer]:
        yield from _moe_block(arch, layer, names)
    else:
        mlp = family.mlp
        classes = (class_name(family, family.mlp_class),)
        yield names.module(mlp, classes, "mlp")
        yield from _mlp(arch, _Names(arch, f"{here}.{mlp}", layer), "mlp", arch.dense_size)
    if family.shared == "shared_mlp" and arch.shared_size:
        yield from _shared_mlp(arch, layer, names)
    for norm in family.norms:
        yield names.module(norm, _norm(arch), "norm", _norm_shapes(arch, arch.hidden_size))


def _mixer(arch: Arch, layer: int, names: _Names) -> Iterator[Module]:
    """What a layer has instead of attention; rules and device maps treat it as such."""
    mixer, family = arch.mixer, arch.family
    assert mixer is not None
    yield names.module(
        mixer.name, (class_name(family, mixer.class_suffix),), "attention", mixer.shapes
    )
    inner = _Names(arch, f"{names.parent}.{mixer.name}", layer)
    for name, cls, shapes in mixer.children:
        part = "norm" if name.endswith("norm") else "attention"
        cls = family.prefix + cls[1:] if cls.startswith("~") else cls
        yield inner.module(name, (cls,), part, shapes)


def _shared_mlp(arch: Arch, layer: int, names: _Names) -> Iterator[Module]:
    """Granite's shared expert stands beside the block and has gate and up in one matrix."""
    yield names.module("shared_mlp", (class_name(arch.family, arch.family.mlp_class),), "shared")
    below = _Names(arch, f"{names.parent}.shared_mlp", layer)
    yield below.linear("input_linear", "shared", 2 * arch.shared_size, arch.hidden_size)
    yield below.linear("output_linear", "shared", arch.hidden_size, arch.shared_size)


def _mlp(arch: Arch, names: _Names, part: str, size: int) -> Iterator[Module]:
    hidden = arch.hidden_size
    yield names.linear("gate_proj", part, size, hidden)
    yield names.linear("up_proj", part, size, hidden)
    yield names.linear("down_proj", part, hidden, size)


def _attention(arch: Arch, layer: int, names: _Names) -> Iterator[Module]:
    family, hidden, heads = arch.family, arch.hidden_size, arch.num_heads
    sinks: tuple[Shape, ...] = ((heads,),) if family.sinks else ()
    classes = (class_name(family, family.attention_class), *old(arch, "attention"))
    yield names.module("self_attn", classes, "attention", sinks)
    inner = _Names(arch, f"{names.parent}.self_attn", layer)
    if arch.is_mla:
        yield from _mla(arch, inner)
    else:
        q, kv = heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        gated = 2 if family.gated_attention else 1
        yield inner.linear("q_proj", "attention", gated * q, hidden, arch.qkv_bias)
        yield inner.linear("k_proj", "attention", kv, hidden, arch.qkv_bias)
        yield inner.linear("v_proj", "attention", kv, hidden, arch.qkv_bias)
        yield inner.linear("o_proj", "attention", hidden, q, arch.o_bias)
        if arch.qk_norm != "none":
            full = arch.qk_norm == "full"
            for name, size in (("q_norm", q), ("k_norm", kv)):
                yield inner.module(name, _norm(arch), "norm", ((size if full else arch.head_dim,),))
    if family.rotary_class:
        yield inner.module("rotary_emb", _rotary(arch), "rotary", legacy=True)


def _mla(arch: Arch, names: _Names) -> Iterator[Module]:
    hidden, heads, rank = arch.hidden_size, arch.num_heads, arch.kv_lora_rank
    q = heads * arch.head_dim
    if arch.q_lora_rank:
        yield names.linear("q_a_proj", "attention", arch.q_lora_rank, hidden, arch.qkv_bias)
        yield names.module("q_a_layernorm", _norm(arch), "norm", ((arch.q_lora_rank,),))
        yield names.linear("q_b_proj", "attention", q, arch.q_lora_rank)
    else:
        yield names.linear("q_proj", "attention", q, hidden)
    yield names.linear(
        "kv_a_proj_with_mqa", "attention", rank + arch.rope_head_dim, hidden, arch.qkv_bias
    )
    yield names.module("kv_a_layernorm", _norm(arch), "norm", ((rank,),))
    nope = arch.head_dim - arch.rope_head_dim
    yield names.linear("kv_b_proj", "attention", heads * (nope + arch.v_head_dim), rank)
    yield names.linear("o_proj", "attention", hidden, heads * arch.v_head_dim, arch.qkv_bias)


def _moe_block(arch: Arch, layer: int, names: _Names) -> Iterator[Module]:
    family, hidden, experts = arch.family, arch.hidden_size, arch.experts
    base = arch.prefix + f"layers.{layer}"
    classes = (class_name(family, family.block_class), *old(arch, "block"))
    block_name, alias = family.block, family.block_alias
    outer = names.module(block_name, classes, "block")
    if alias:
        also = tuple(n[: -len(block_name)] + alias for n in outer.names)
        outer = Module(outer.name, outer.classes, "block", layer, (), outer.aliases + also)
    yield outer
    block = _Names(arch, f"{base}.{block_name}", layer, f"{base}.{alias}" if alias else "")
    router: tuple[Shape, ...] = ((experts.num_experts, hidden),)
    if family.router_bias:
        router += ((experts.num_experts,),)
    router_classes = (class_name(family, family.router_class), *old(arch, "router"))
    if not old(arch, "router"):
        router_classes += ("Linear",)  # as it was before transformers 5
    yield block.module(family.router, router_classes, "router", router)
    if family.router_below[0]:
        name, cls = family.router_below
        yield block.module(
            f"{family.router}.{name}",
            (class_name(family, cls),),
            "router",
            ((1, experts.num_experts),),
        )
    yield block.module(
        "experts", (class_name(family, family.experts_class), "ModuleList"), "experts"
    )
    if arch.shared_size and family.shared != "shared_mlp":
        shared = family.shared or "shared_experts"
        yield block.module(shared, (class_name(family, family.mlp_class),), "shared")
        below = _Names(
            arch,
            f"{base}.{block_name}.{shared}",
            layer,
            f"{base}.{alias}.{shared}" if alias else "",
        )
        yield from _mlp(arch, below, "shared", arch.shared_size)
        if family.shared_gate:
            yield block.linear("shared_expert_gate", "shared", 1, hidden)


def _vision(arch: Arch) -> Module:
    """The vision tower as one module; its bytes are an estimate: attention 4h^2 and MLP 2hi a
    layer.
    """
    assert arch.vision is not None
    hidden, size = arch.vision.hidden_size, arch.vision.intermediate_size
    layer: tuple[Shape, ...] = ((4 * hidden, hidden), (size, hidden), (hidden, size))
    return Module(
        "model.visual",
        ("VisionModel", "Module"),
        "vision",
        shapes=layer * arch.vision.num_layers,
        aliases=tuple(
            f"{parent}{name}"
            for parent in ("model.", "")
            for name in ("vision_model", "vision_tower", "visual", "multi_modal_projector")
            if f"{parent}{name}" != "model.visual"
        ),
    )
