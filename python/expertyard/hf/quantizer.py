# SPDX-License-Identifier: Apache-2.0
"""Road A: from_pretrained(path, quantization_config=ExpertsConfig(...)).

transformers lets a quantizer change the model's skeleton before weights are loaded, and finish it
afterwards. Before: every check that can fail is made from headers alone, then the experts modules
make way for ones without parameters, so that transformers never reads an expert. After: the experts
come from the same files by our own loader, to where the plan says.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from ..dispatch import LayerExperts, RunOptions, join, make_policy, measure_new
from ..errors import ConfigError, LoadError
from ..loading import Checkpoint, LayerSource, check, layer_bytes, metered, native_format
from ..loading.expert import keys_of
from ..loading.packed_folder import PackedFolder, is_packed
from ..plan import Plan
from .config import QUANT_METHOD, ExpertsConfig
from .kept import (
    check_mapped,
    fill_kept,
    fill_mapped,
    make_plain,
    put_empty,
    saved_bytes,
    shapes_of,
)
from .layers import find_experts, recognise
from .module import ExpertyardExperts
from .outside import replacement
from .parts import load_experts, map_experts
from .place import place_dense
from .planning import make_promises
from .reading import Reading, current_reading
from .running import layers_of, link
from .shared import run_beside
from .sources import find_sources
from .state import Promise, Promised, remember

__all__ = ["ExpertyardHfQuantizer"]


@register_quantizer(QUANT_METHOD)
class ExpertyardHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Not a quantizer in itself: transformers' name for whoever loads weights differently."""

    requires_calibration = False

    def __init__(self, quantization_config: ExpertsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._reading: Reading | None = None
        self._promises: tuple[Promised, ...] = ()
        self._plan: Plan | None = None
        self._dtype = torch.get_default_dtype()  # of everything but the experts

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """ConfigError if a device_map asks for something else than the plan."""
        if isinstance(device_map, dict) and set(map(str, device_map.values())) == {"cpu"}:
            return  # dense weights are loaded into RAM in any case
        if device_map not in (None, "auto"):
            raise ConfigError(
                f"device_map={device_map!r} and ExpertsConfig both say where the model goes. Leave "
                "device_map out and say it with ExpertsConfig(rules=..., layers=..., memory=...)."
            )

    def update_device_map(self, device_map: Any) -> None:
        return None  # the plan decides; place_dense() moves what transformers has loaded into RAM

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        read = current_reading()
        if read is None:
            read = self._from_files(model, checkpoint_files)
        modules = find_experts(model)
        layouts = {name: recognise(module, name) for name, module in modules.items()}
        if read.packed is not None:
            read.packed.check(layouts)
            check_mapped(model, read.packed)
            native = read.packed.formats(layouts)
        else:
            assert read.checkpoint is not None
            for source in read.sources:
                check(read.checkpoint, source)
            native = _native(
                read.checkpoint, read.sources, "format" not in self.quantization_config.given
            )
        self._dtype = dtype or torch.get_default_dtype()
        saved = None
        if read.packed is not None and self.quantization_config.options.dense == "keep":
            saved = saved_bytes(read.packed.matrix_shapes(), self._dtype.itemsize)
        elif read.kept.layers or read.kept.plain:
            assert read.checkpoint is not None
            saved = saved_bytes(shapes_of(read.kept, read.checkpoint), self._dtype.itemsize)
        plan, promises = make_promises(
            self.quantization_config,
            {**model.config.to_dict(), "quantization_config": None},
            layouts,
            self._dtype,
            folder=read.folder,
            native=native,
            saved=saved,
        )
        if read.packed is not None:
            wanted = [
                (p.name, part.format)
                for p in promises
                if p.placement is not None
                for part in p.placement.parts
            ]
            for name, format in wanted:
                read.packed.check_formats({name: format})
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            instead = replacement(module, layouts[name], getattr(module, "config", model.config))
            instead.stand_in(True)
            model.get_submodule(parent)._modules[leaf] = instead
        put_empty(model, read.packed.matrices if read.packed is not None else read.kept.layers)
        _ignore_unexpected(model, list(modules))
        _untie(model, list(modules))
        self._reading = read
        self._promises, self._plan = promises, plan

    def _from_files(self, model: Any, files: list[str] | None) -> Reading:
        if not files:
            raise LoadError(
                "ExpertsConfig reads experts from safetensors files, but there are none: the model "
                "is made from a state_dict. Use expertyard.attach(model) on it instead."
            )
        folder = Path(files[0]).parent
        if is_packed(folder):
            return Reading(packed=PackedFolder(folder))
        checkpoint = Checkpoint(files)
        modules = find_experts(model)
        layouts = {name: recognise(module, name) for name, module in modules.items()}
        sources = find_sources(model, checkpoint, layouts)
        return Reading(checkpoint, tuple(sources), folder=folder)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        read, plan, options = self._reading, self._plan, self.quantization_config.options
        assert read is not None and plan is not None
        again = {source.name for source in read.sources if source.same_as}
        shared = join(
            [
                p.placement
                for p in self._promises
                if p.placement is not None and p.name not in again
            ],
            options,
        )
        for promised, experts in self._made(read, options, shared):
            module = model.get_submodule(promised.name)
            assert isinstance(module, ExpertyardExperts)
            module.stand_in(False)
            if promised.name not in again:
                experts.after = make_policy(options.policy, experts)
            module.experts = experts
        if read.packed is not None:
            fill_mapped(model, read.packed)
            if options.dense == "plain":
                make_plain(model, read.packed.matrices, self._dtype)
        elif read.kept.layers:
            assert read.checkpoint is not None
            fill_kept(model, read.kept, read.checkpoint)
        place_dense(model, plan, self._promises)
        remember(model, Promise("load", plan, self._promises, options))
        layers = list(layers_of(model).values())
        link(layers)
        measure_new(layers)
        for promised in self._promises:
            if promised.placement is not None:
                run_beside(model, promised.name, promised.placement.home)
        if shared is not None:
            shared.loaded()
        self._reading = None  # what is mapped is kept by the packed experts
        return model

    def _made(
        self, read: Reading, options: RunOptions, shared: Any
    ) -> Iterator[tuple[Promised, LayerExperts]]:
        """Each layer's experts, read or mapped, with a progress bar if it takes long."""
        if read.packed is not None:
            for promised in self._promises:
                yield promised, map_experts(read.packed, promised, options, shared)
            return
        checkpoint = read.checkpoint
        assert checkpoint is not None
        each = list(zip(read.sources, self._promises, strict=True))
        owners = [(source, promised) for source, promised in each if not source.same_as]
        made: dict[str, LayerExperts] = {}
        total = sum(layer_bytes(checkpoint, source) for source, _ in owners)
        with metered(total, "Packing experts") as meter:
            for source, promised in owners:
                made[source.name] = load_experts(
                    checkpoint, source, promised, options, shared, advance=meter.advance
                )
                yield promised, made[source.name]
        for source, promised in each:
            if source.same_as:
                yield promised, made[source.same_as]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """ConfigError: transformers asks in save_pretrained(), and has no words for what to do."""
        raise ConfigError(
            "save_pretrained: the experts of a model loaded with ExpertsConfig lie as kernels read "
            "them and are no parameters; the checkpoint that they came from still is the model's. "
            "To write it in another format: `expertyard pack PATH -o OUT --format int4`. To save a "
            "model that you have changed, load it with transformers alone and call "
            "expertyard.attach(model): then save_pretrained() works as ever."
        )

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


register_quantization_config(QUANT_METHOD)(ExpertsConfig)


def _native(checkpoint: Checkpoint, sources: Sequence[LayerSource], keep: bool) -> dict[str, str]:
    """The format that each layer's experts have in the files, if any of them are quantised.

    keep  whether they will keep it; then what is lost all the same is said
    """
    if not any(checkpoint.stored(key) for source in sources for key in keys_of(source)):
        return {}
    found = {source.name: native_format(checkpoint, source) for source in sources}
    losses = sorted({loss for _, loss in found.values() if loss})
    if keep and losses:
        warnings.warn(f"Not all experts are kept as they are: {'; '.join(losses)}.", stacklevel=2)
    return {name: format for name, (format, _) in found.items()}


def _ignore_unexpected(model: Any, names: list[str]) -> None:
    """Keeps transformers from reporting the experts' tensors, which it does not load."""
    prefix = f"{model.base_model_prefix}."
    patterns = [rf"(^|\.){re.escape(name.removeprefix(prefix))}\." for name in names]
    ignored = model._keys_to_ignore_on_load_unexpected
    # a list before transformers 5.8, a set since; it must stay what it was
    model._keys_to_ignore_on_load_unexpected = (
        {*ignored, *patterns} if isinstance(ignored, set) else [*(ignored or []), *patterns]
    )


def _untie(model: Any, names: list[str]) -> None:
    """Forgets that experts modules share parameters, which they do not have any more."""
    experts = tuple(f"{name}." for name in names)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    gone = [target for target in tied if target.startswith(experts)]
    for target in gone:
        del tied[target]
    if not gone:
        return
    for module in model.modules():
        patterns = getattr(module, "_tied_weights_keys", None)
        if isinstance(patterns, dict):
            left = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            left |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
            module._tied_weights_keys = {
                target: source
                for target, source in patterns.items()
                if any(re.search(f"^{target}", name) for name in left)
            }


def _say_what_to_do(merge: Any) -> Any:
    """transformers' own message tells the user to pass a config of the checkpoint's class."""

    def merge_quantization_configs(quantization_config: Any, from_args: Any = None) -> Any:
        if isinstance(from_args, ExpertsConfig):
            own = quantization_config
            method = own.get("quant_method") if isinstance(own, dict) else own.quant_method
            if method != QUANT_METHOD:
                raise ConfigError(
                    f"This checkpoint is quantised already ({getattr(method, 'value', method)}: see"
                    " quantization_config in its config.json), and transformers' from_pretrained "
                    "takes one quantisation only. Load it with "
                    "expertyard.from_pretrained(path, quantization_config=ExpertsConfig(...))."
                )
        return merge(quantization_config, from_args)

    return merge_quantization_configs


AutoHfQuantizer.merge_quantization_configs = staticmethod(
    _say_what_to_do(AutoHfQuantizer.merge_quantization_configs)
)
