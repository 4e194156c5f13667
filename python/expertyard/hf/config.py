# SPDX-License-Identifier: Apache-2.0
"""ExpertsConfig: what a user asks of Expertyard, in the form that from_pretrained takes."""

import dataclasses
import inspect
import json
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ConfigError
from ..plan import Request
from ..weights import MODES

__all__ = ["PACKED", "QUANT_METHOD", "ExpertsConfig"]

QUANT_METHOD = "expertyard"
PACKED = "packed"  # in config.json of a folder that `expertyard pack` has written


class ExpertsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which experts go where, and in which format.

    Takes the keywords of expertyard.Request, which are those of `expertyard plan`:
    rules, layers, memory, format, context and so on. Without `format`, experts keep the model's
    dtype (bf16, fp16 or fp32), or the format that a quantised checkpoint has.
    And of its own, how weights are quantised and computed:

    search  True: look for the scales with the least squared error; slower to load (default False)
    mode    of the CPU kernels: "exact" (activations as they are) or "fast" (quantised to 8 bits)

    Raises ConfigError for a keyword that does not exist.

        from_pretrained(path, quantization_config=ExpertsConfig(rules="rules.yaml"))
    """

    # what `help(ExpertsConfig)` and editors show: Request's keywords, said once, and ours
    __signature__ = inspect.Signature(
        [
            *inspect.signature(Request).parameters.values(),
            inspect.Parameter("search", inspect.Parameter.KEYWORD_ONLY, default=False),
            inspect.Parameter("mode", inspect.Parameter.KEYWORD_ONLY, default="exact"),
        ]
    )

    def __init__(self, **request: Any) -> None:
        for name in ("quant_method", PACKED):  # in a dictionary that to_dict() or pack has made
            request.pop(name, None)
        self.quant_method = QUANT_METHOD
        self.given = dict(request)
        self.search: bool = request.pop("search", False)
        self.mode: str = request.pop("mode", "exact")
        if not isinstance(self.search, bool):
            raise ConfigError(f"search: expected True or False, got {self.search!r}.")
        if self.mode not in MODES:
            raise ConfigError(f"mode: expected {' or '.join(MODES)}, got {self.mode!r}.")
        self.request: Request = Request.from_dict(request)

    def for_dtype(self, dense: str, experts: str | None = None) -> Request:
        """The request, with the model's own formats where the user has not named one."""
        kept = {"format": experts or dense, "dense_format": dense, **self.given}
        own = {name: kept[name] for name in kept if name not in ("search", "mode")}
        return dataclasses.replace(self.request, **own)

    def to_dict(self) -> dict[str, Any]:
        """quant_method and the keywords that were given."""
        return {"quant_method": QUANT_METHOD, **self.given}

    def get(self, key: str, default: Any = None) -> Any:
        """As a dictionary's: transformers reads a loaded model's config like one from a file."""
        return self.to_dict().get(key, default)

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str) + "\n"

    def __repr__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.given.items())
        return f"ExpertsConfig({given})"
