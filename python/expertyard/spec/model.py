# SPDX-License-Identifier: Apache-2.0
"""What the planner knows of a model: layers, expert shapes, bytes. Plain frozen data; reads
nothing.

P, the weights of one expert, is 3 * hidden_size * intermediate_size: gate, up and down; 2 * ...
where there is no gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertyard.formats import get_format

if TYPE_CHECKING:
    from expertyard.spec.arch import Arch

Shape = tuple[int, ...]

WITHOUT_GATE = ("relu2",)  # activations of experts that have up and down alone


def shapes_bytes(shapes: tuple[Shape, ...], format: str) -> int:
    """Bytes of dense tensors: matrices in `format`, everything else unquantised."""
    fmt = get_format(format)
    total = 0
    for shape in shapes:
        if len(shape) == 2:
            total += fmt.matrix_bytes(shape[0], shape[1])
        else:
            total += fmt.vector_bytes * count(shape)
    return total


def count(shape: Shape) -> int:
    """Number of elements of a tensor of that shape."""
    elements = 1
    for size in shape:
        elements *= size
    return elements


@dataclass(frozen=True)
class ExpertShape:
    """The routed experts of one layer: all of one shape."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    bias: bool = False

    @property
    def params(self) -> int:
        """Weights of one expert, without biases."""
        return self._matrices * self.hidden_size * self.intermediate_size

    @property
    def _matrices(self) -> int:
        return 2 if self.activation in WITHOUT_GATE else 3

    @property
    def bias_params(self) -> int:
        """Biases of one expert: 2I for gate and up, H for down (gpt-oss)."""
        return 2 * self.intermediate_size + self.hidden_size if self.bias else 0

    def bytes(self, format: str) -> int:
        """Bytes of one expert's matrices in `format`, scales included, biases not."""
        matrix = get_format(format).matrix_bytes
        h, i = self.hidden_size, self.intermediate_size
        return (self._matrices - 1) * matrix(i, h) + matrix(h, i)

    def bias_bytes(self, format: str) -> int:
        """Bytes of one expert's biases, which no format quantises."""
        return get_format(format).vector_bytes * self.bias_params


@dataclass(frozen=True)
class Stored:
    """Exact bytes as a checkpoint's headers give them, and the format they are in."""

    format: str
    bytes: int


@dataclass(frozen=True)
class Module:
    """One module of the model's tree, as data: what rules match against.

    `aliases` are names that the same module has in other layouts of the same model (older
    transformers, the checkpoint); `classes` its class and the names it has elsewhere; `legacy`
    marks a module that only another layout has.
    """

    name: str
    classes: tuple[str, ...]
    part: str
    layer: int | None = None
    shapes: tuple[Shape, ...] = ()
    aliases: tuple[str, ...] = ()
    legacy: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. `dense` is everything but the routed experts."""

    layer: int
    dense: tuple[Shape, ...]
    experts: ExpertShape | None
    kv_elements: int  # per cached token, in elements
    window: int | None = None  # tokens that the cache keeps at most (sliding or chunked attention)
    stored_dense: Stored | None = None
    stored_experts: Stored | None = None

    @property
    def is_moe(self) -> bool:
        return self.experts is not None

    @property
    def dense_params(self) -> int:
        return sum(count(shape) for shape in self.dense)

    def dense_bytes(self, format: str) -> int:
        """Bytes of attention, norms, router, shared experts or dense MLP; exact where known."""
        if self.stored_dense is not None and self.stored_dense.format == format:
            return self.stored_dense.bytes
        return shapes_bytes(self.dense, format)

    def expert_bytes(self, format: str) -> int:
        """Bytes of one routed expert, without biases; exact where the checkpoint is in `format`."""
        if self.experts is None:
            return 0
        if self.stored_experts is not None and self.stored_experts.format == format:
            return self.stored_experts.bytes // self.experts.num_experts
        return self.experts.bytes(format)

    def expert_bias_bytes(self, format: str) -> int:
        return 0 if self.experts is None else self.experts.bias_bytes(format)

    def kv_bytes(self, context: int, batch: int, element_bytes: int = 2) -> int:
        """KV cache of this layer for `batch` sequences of `context` tokens."""
        tokens = context if self.window is None else min(context, self.window)
        return batch * tokens * self.kv_elements * element_bytes


@dataclass(frozen=True)
class ModelSpec:
    """A model, as far as placement needs to know it. Build one with the from_ methods.

    `embedding`, `head`, `norm` and `vision` hold shapes of what lies outside the decoder layers;
    `head` is empty when the embedding is tied.
    """

    name: str
    model_type: str
    architecture: str
    hidden_size: int
    vocab_size: int
    num_heads: int
    layers: tuple[LayerSpec, ...]
    embedding: tuple[Shape, ...]
    head: tuple[Shape, ...]
    norm: tuple[Shape, ...]
    vision: tuple[Shape, ...] = ()
    tie_word_embeddings: bool = False
    known_family: bool = True
    arch: Arch | None = field(default=None, repr=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer.layer for layer in self.layers if layer.is_moe)

    @property
    def outside(self) -> tuple[Shape, ...]:
        """Shapes of everything outside the decoder layers."""
        return self.embedding + self.head + self.norm + self.vision

    @property
    def routed_params(self) -> int:
        """Weights (and biases) of all routed experts."""
        return sum(
            layer.experts.num_experts * (layer.experts.params + layer.experts.bias_params)
            for layer in self.layers
            if layer.experts is not None
        )

    @property
    def total_params(self) -> int:
        dense = sum(layer.dense_params for layer in self.layers)
        return dense + self.routed_params + sum(count(shape) for shape in self.outside)

    @property
    def active_params(self) -> int:
        """Weights that one token touches; the embedding table is not read, a tied head is."""
        routed = sum(
            layer.experts.top_k * (layer.experts.params + layer.experts.bias_params)
            for layer in self.layers
            if layer.experts is not None
        )
        head = self.head or self.embedding
        dense = sum(layer.dense_params for layer in self.layers)
        return routed + dense + sum(count(shape) for shape in head + self.norm)

    @cached_property
    def tree(self) -> tuple[Module, ...]:
        """The module tree, depth first, root included, without the single experts."""
        from expertyard.spec.tree import build_tree

        return build_tree(self.arch) if self.arch is not None else ()

    def renamed(self, name: str) -> ModelSpec:
        return replace(self, name=name)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | str | Path, name: str | None = None
    ) -> ModelSpec:
        """From a config.json: a dict, the file, or the folder that has it.

        Raises SpecError for what is no model description or no mixture-of-experts model.
        """
        from expertyard.spec.config import spec_from_config

        return spec_from_config(config, name)

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelSpec:
        """From a folder with config.json; exact bytes where it has safetensors files too.

        Raises SpecError for the config, LoadError for files that are missing, cut off or corrupt.
        """
        from expertyard.spec.checkpoint import spec_from_folder

        return spec_from_folder(Path(path))

    @classmethod
    def from_family(cls, name: str) -> ModelSpec:
        """From a published model's name such as Mixtral-8x7B, without any file."""
        from expertyard.spec.known import spec_from_family

        return spec_from_family(name)
