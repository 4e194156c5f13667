# SPDX-License-Identifier: Apache-2.0
"""Road A: from_pretrained(path, quantization_config=ExpertsConfig(...)).

transformers lets a quantizer change the model's skeleton before weights are loaded, and finish it
afterwards. Before: every check that can fail is made from headers alone, then the experts modules
make way for ones without parameters, so that transformers never reads an expert. After: the experts
come from the same files by our own loader, to where the plan says.
"""

import re
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

from ..dispatch import join, make_policy
from ..errors import ConfigError, LoadError
from ..loading import Checkpoint, LayerSource, check, tracked
from ..plan import Plan
from .config import QUANT_METHOD, ExpertsConfig
from .layers import find_experts, recognise
from .module import ExpertyardExperts
from .parts import load_experts
from .place import place_dense
from .planning import make_promises
from .running import layers_of, link
from .sources import find_sources
from .state import Promise, Promised, remember

__all__ = ["ExpertyardHfQuantizer"]


@register_quantizer(QUANT_METHOD)
class ExpertyardHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Not a quantizer in itself: transformers' name for whoever loads weights differently."""

    requires_calibration = False

    def __init__(self, quantization_config: ExpertsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checkpoint: Checkpoint | None = None
        self._sources: list[LayerSource] = []
        self._promises: tuple[Promised, ...] = ()
        self._plan: Plan | None = None

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
        if not checkpoint_files:
            raise LoadError(
                "ExpertsConfig reads experts from safetensors files, but there are none: the model "
                "is made from a state_dict. Use expertyard.attach(model) on it instead."
            )
        checkpoint = Checkpoint(checkpoint_files)
        modules = find_experts(model)
        layouts = {name: recognise(module, name) for name, module in modules.items()}
        sources = find_sources(model, checkpoint, layouts)
        for source in sources:
            check(checkpoint, source)
        plan, promises = make_promises(
            self.quantization_config,
            {**model.config.to_dict(), "quantization_config": None},
            layouts,
            dtype or torch.get_default_dtype(),
            folder=Path(checkpoint_files[0]).parent,
        )
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            replacement = ExpertyardExperts(layouts[name], module.config)
            model.get_submodule(parent)._modules[leaf] = replacement
        _ignore_unexpected(model, list(modules))
        self._checkpoint, self._sources = checkpoint, sources
        self._promises, self._plan = promises, plan

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        assert self._checkpoint is not None and self._plan is not None
        options = self.quantization_config.options
        shared = join([p.placement for p in self._promises if p.placement is not None], options)
        work = list(zip(self._sources, self._promises, strict=True))
        for source, promised in tracked(work, "Packing experts"):
            experts = model.get_submodule(source.name)
            assert isinstance(experts, ExpertyardExperts)
            experts.experts = load_experts(self._checkpoint, source, promised, options, shared)
            experts.experts.after = make_policy(options.policy, experts.experts)
        place_dense(model, self._plan, self._promises)
        remember(model, Promise("load", self._plan, self._promises, options))
        link(list(layers_of(model).values()))
        self._checkpoint, self._sources = None, []  # what is mapped is kept by the packed experts
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False  # the checkpoint that was loaded still is the model's; nothing to save

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


register_quantization_config(QUANT_METHOD)(ExpertsConfig)


def _ignore_unexpected(model: Any, names: list[str]) -> None:
    """Keeps transformers from reporting the experts' tensors, which it does not load."""
    prefix = f"{model.base_model_prefix}."
    patterns = [rf"(^|\.){re.escape(name.removeprefix(prefix))}\." for name in names]
    ignored = model._keys_to_ignore_on_load_unexpected
    # a list before transformers 5.8, a set since; it must stay what it was
    model._keys_to_ignore_on_load_unexpected = (
        {*ignored, *patterns} if isinstance(ignored, set) else [*(ignored or []), *patterns]
    )


def _say_what_to_do(merge: Any) -> Any:
    """transformers' own message tells the user to pass a config of the checkpoint's class."""

    def merge_quantization_configs(quantization_config: Any, from_args: Any = None) -> Any:
        if isinstance(from_args, ExpertsConfig):
            own = quantization_config
            method = own.get("quant_method") if isinstance(own, dict) else own.quant_method
            if method != QUANT_METHOD:
                raise ConfigError(
                    f"This checkpoint is quantised already ({getattr(method, 'value', method)}: see"
                    " quantization_config in its config.json), and ExpertsConfig does not read "
                    "quantised checkpoints yet. Load its bfloat16 version, or load it without "
                    "ExpertsConfig."
                )
        return merge(quantization_config, from_args)

    return merge_quantization_configs


AutoHfQuantizer.merge_quantization_configs = staticmethod(
    _say_what_to_do(AutoHfQuantizer.merge_quantization_configs)
)
