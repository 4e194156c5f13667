# SPDX-License-Identifier: Apache-2.0
"""Road C: attach() puts a model in memory on our kernels, detach() takes it off again.

Modules, classes and parameters stay the objects that they are; only the `forward` of each experts
module is covered by ours, on the instance. detach() uncovers it.
"""

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from ..dispatch import LayerExperts, RunOptions, measure_new
from ..dispatch.parallel import ranks_of
from ..errors import ConfigError
from .binding import bind, lay_out_as_declared, unbind
from .config import ExpertsConfig
from .interface import experts_forward
from .layers import find_experts, layer_number, recognise
from .planning import make_promises
from .state import Promise, Promised, forget, promise_of, remember

__all__ = ["attach", "covered", "detach"]


def attach(model: Any, config: ExpertsConfig | None = None) -> Any:
    """Runs the experts of a transformers model on Expertyard's kernels; returns the model.

    Without a config, experts run where their parameters lie, in place. With one, the plan is made
    from model.config and experts that it puts elsewhere, or in another format, are copied there;
    the dense part of the model stays where it is.
    Raises KernelError, PlanError, DeviceError or ConfigError, and leaves the model as it was.
    """
    if promise_of(model) is not None:
        raise ConfigError(
            "This model already runs on Expertyard. Call expertyard.detach(model) first."
        )
    modules = find_experts(model)
    layouts = {name: recognise(module, name) for name, module in modules.items()}
    plan, options = None, RunOptions()
    if config is None:
        promises = tuple(
            Promised(name, layer_number(name), layout) for name, layout in layouts.items()
        )
    else:
        if not isinstance(config, ExpertsConfig):
            raise ConfigError(f"attach: expected an ExpertsConfig, got {type(config).__name__}.")
        dtype = next(next(iter(modules.values())).parameters()).dtype
        options = config.options
        if options.defer:
            raise ConfigError("attach: defer works for models loaded with ExpertsConfig only.")
        plan, promises = make_promises(config, model.config.to_dict(), layouts, dtype)
    if any(p.placement is not None and ranks_of([p.placement]) for p in promises):
        raise ConfigError(
            "attach: experts of other processes are for models loaded with ExpertsConfig only."
        )
    done: list[nn.Module] = []
    layers: list[LayerExperts] = []
    try:
        for promised in promises:
            module = modules[promised.name]
            done.append(module)
            layers.append(bind(module, promised.placement, options, promised.layer).experts())
            _cover(module)
        measure_new(layers)
    except BaseException:
        for module in done:
            _uncover(module)
        raise
    promises = tuple(
        replace(promised, home=str(next(modules[promised.name].parameters()).device))
        for promised in promises
    )
    remember(model, Promise("attach", plan, promises, options))
    return model


def detach(model: Any) -> Any:
    """Undoes attach(): the same modules, classes, parameters and outputs as before; returns it.

    Raises ConfigError if the model is not attached.
    """
    promise = promise_of(model)
    if promise is None or promise.road != "attach":
        raise ConfigError(
            "detach: this model was not attached with expertyard.attach(). A model loaded with "
            "ExpertsConfig has no other experts to go back to: load it again without."
            if promise is not None
            else "detach: this model was not attached with expertyard.attach()."
        )
    for promised in promise.layers:
        _uncover(model.get_submodule(promised.name))
    forget(model)
    return model


class _Forward:
    """Our forward in the place of a module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return experts_forward(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        return _Forward(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> Any:
        raise ConfigError(
            "A model that runs on Expertyard by attach() cannot be pickled. Call "
            "expertyard.detach(model) first, and attach() again after loading."
        )


def _slot(module: nn.Module) -> str:
    # accelerate's hook is in `forward` and calls what was there before by this name
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def _cover(module: nn.Module) -> None:
    slot = _slot(module)
    covered_by_accelerate = module.__dict__.get(slot)
    if covered_by_accelerate is not None:
        module.__dict__["_expertyard_covered"] = covered_by_accelerate
    module.__dict__[slot] = _Forward(module)


def _uncover(module: nn.Module) -> None:
    binding = unbind(module)
    slot = _slot(module)
    if covered(module):
        del module.__dict__[slot]
    if (before := module.__dict__.pop("_expertyard_covered", None)) is not None:
        module.__dict__[slot] = before
    if binding is not None and binding.layout.transposed:
        lay_out_as_declared(module, binding.layout)


def covered(module: nn.Module) -> bool:
    """Whether attach() has covered this module's forward."""
    return isinstance(module.__dict__.get(_slot(module)), _Forward)
