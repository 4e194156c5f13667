# SPDX-License-Identifier: Apache-2.0
"""One timed generation with model.generate(): its tokens, and how long prefill and decode took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

__all__ = ["Generation", "generate"]


@dataclass(frozen=True)
class Generation:
    """Tokens and seconds. The first new token belongs to the prefill, the others to decode."""

    tokens: tuple[int, ...]  # the new ones
    num_prompt: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def num_new(self) -> int:
        return len(self.tokens)

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second."""
        return self.num_prompt / self.prefill_seconds

    @property
    def decode_speed(self) -> float:
        """New tokens per second; 0 if only one was made."""
        return (self.num_new - 1) / self.decode_seconds if self.num_new > 1 else 0.0


class _Clock:
    """A streamer that notes when tokens arrive: put() gets the prompt first, then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class _Printer(TextStreamer):  # type: ignore[misc]
    """The same, and the text goes to stdout as it comes."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)


def generate(
    model: Any,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: Any = None,
    stop_early: bool = True,
) -> Generation:
    """Generates after prompt_ids [1, T].

    temperature  0: greedy
    tokenizer    if given, the text is printed to stdout as it comes
    stop_early   False: an end-of-text token is never chosen, so that the number of tokens is fixed
    """
    prompt_ids = prompt_ids.to(model.get_input_embeddings().weight.device)
    streamer = _Printer(tokenizer) if tokenizer is not None else _Clock()
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    if not stop_early:
        sampling["min_new_tokens"] = max_new_tokens
    pad = model.generation_config.pad_token_id
    torch.manual_seed(seed)
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=0 if pad is None else pad,
            streamer=streamer,
            **sampling,
        )
    first, last = streamer.times[1], streamer.times[-1]
    num_prompt = prompt_ids.shape[1]
    tokens = tuple(out[0, num_prompt:].tolist())
    return Generation(tokens, num_prompt, first - begin, last - first)
