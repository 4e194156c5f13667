# SPDX-License-Identifier: Apache-2.0
"""ExpertsConfig: what a user asks of Expertyard, in the form that from_pretrained takes."""

import dataclasses
import inspect
import json
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..dispatch import RunOptions
from ..plan import Request

__all__ = ["PACKED", "QUANT_METHOD", "ExpertsConfig"]

QUANT_METHOD = "expertyard"
PACKED = "packed"  # in config.json of a folder that `expertyard pack` has written


class ExpertsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which experts go where, and in which format.

    Takes the keywords of expertyard.Request, which are those of `expertyard plan`:
    rules, layers, memory, format, context and so on. Without `format`, experts keep the model's
    dtype (bf16, fp16 or fp32), or the format that a quantised checkpoint has. And those of
    expertyard.dispatch.RunOptions, which say how the plan is run: search, mode, policy,
    out_of_memory, timeout, prefill_tokens, tokens, defer.
    Raises ConfigError for a keyword that does not exist.

        from_pretrained(path, quantization_config=ExpertsConfig(rules="rules.yaml"))
    """

    # what `help(ExpertsConfig)` and editors show: the keywords of both, said once
    __signature__ = inspect.Signature(
        [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for known in (Request, RunOptions)
            for parameter in inspect.signature(known).parameters.values()
        ]
    )

    def __init__(self, **request: Any) -> None:
        for name in ("quant_method", PACKED):  # in a dictionary that to_dict() or pack has made
            request.pop(name, None)
        self.quant_method = QUANT_METHOD
        self.given = request
        running = {name: request[name] for name in RunOptions.names() if name in request}
        self.options = RunOptions.from_dict(running)
        self.request: Request = Request.from_dict(self._placement())

    def for_dtype(self, dense: str, experts: str | None = None) -> Request:
        """The request, with the model's own formats where the user has not named one."""
        kept = {"format": experts or dense, "dense_format": dense, **self._placement()}
        return dataclasses.replace(self.request, **kept)

    def _placement(self) -> dict[str, Any]:
        return {key: value for key, value in self.given.items() if key not in RunOptions.names()}

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
