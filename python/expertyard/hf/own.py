# SPDX-License-Identifier: Apache-2.0
"""What a quantised checkpoint keeps of its own when it is loaded: formats and the bytes they take.

Loading plans with it (planning.py), and `expertyard plan` says the same before anything is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import LoadError
from ..formats import get_format
from ..loading import native_format
from ..loading.packed_folder import PackedFolder, is_packed
from ..plan import Plan
from ..spec import ModelSpec
from ..spec.model import LayerSpec, Stored, shapes_bytes
from .kept import choose_kept, saved_bytes, shapes_of
from .layers import layer_number
from .load import open_model
from .skeleton import read_config, settings_of

__all__ = ["Own", "own_of", "spec_of"]

Saved = Mapping[int, tuple[str, int]]


@dataclass(frozen=True)
class Own:
    """experts  layer -> the format that its experts keep; empty where the user names one
    saved       layer -> the format of its other quantised layers, and what that saves of the bytes
                of plain ones; None: the checkpoint has no such layers
    """

    experts: Mapping[int, str] = field(default_factory=dict)
    saved: Saved | None = None

    @property
    def widest(self) -> str | None:
        """Of the experts' formats; a plan counts it for all of them."""
        return max(self.experts.values(), key=_bytes, default=None)

    def in_spec(self, spec: ModelSpec, dense_format: str) -> ModelSpec:
        """The spec whose layers take what they will take once loaded, whatever the files have."""
        if self.saved is None:
            return spec
        saved = self.saved

        def loaded(layer: LayerSpec) -> LayerSpec:
            _, less = saved.get(layer.layer, ("", 0))
            plain = shapes_bytes(layer.dense, dense_format)
            return replace(layer, stored_dense=Stored(dense_format, plain - less))

        return replace(spec, layers=tuple(map(loaded, spec.layers)))

    def in_plan(self, plan: Plan) -> Plan:
        """The plan as it will be obeyed: every layer with the formats that it keeps."""
        dense = {layer: format for layer, (format, _) in (self.saved or {}).items()}
        widest = self.widest
        layers = tuple(
            replace(
                layer,
                dense_format=dense.get(layer.layer, layer.dense_format),
                experts=layer.experts
                and tuple(
                    replace(group, format=self.experts.get(layer.layer, group.format))
                    if group.format == widest
                    else group
                    for group in layer.experts
                ),
            )
            for layer in plan.layers
        )
        return replace(plan, layers=layers)


def own_of(source: Path, itemsize: int = 2) -> tuple[ModelSpec, Own]:
    """Of a folder or a GGUF file. Raises LoadError, KernelError or SpecError.

    itemsize  bytes of a plain weight, in which `saved` is counted
    """
    if source.is_dir() and is_packed(source):
        packed = PackedFolder(source)
        config = read_config(source)
        if settings_of(config) is not None:
            del config.quantization_config
        spec = ModelSpec.from_config(config.to_dict())
        named = {name: layer.format for name, layer in packed.layers.items()}
        shapes = packed.matrix_shapes()
    else:
        opened = open_model(source)
        spec = spec_of(opened.config.to_dict(), opened.spec_folder)
        named = {s.name: native_format(opened.checkpoint, s)[0] for s in opened.sources}
        kept = choose_kept(opened, True)
        shapes = list(shapes_of(kept, opened.checkpoint))
    experts = {layer_number(name): format for name, format in named.items()}
    return spec, Own(experts, saved_bytes(shapes, itemsize) if shapes else None)


def spec_of(model_config: Mapping[str, object], folder: Path | None) -> ModelSpec:
    """The spec of a config; with exact bytes where the folder's headers tell them."""
    if folder is not None:  # exact bytes, where names and layouts are those that specs know
        try:
            return ModelSpec.from_folder(folder)
        except LoadError:  # tensors whose names only transformers' tables know: sizes by the config
            pass
    return ModelSpec.from_config(dict(model_config))


def _bytes(format: str) -> int:
    return get_format(format).matrix_bytes(1024, 1024)
