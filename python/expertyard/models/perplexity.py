# SPDX-License-Identifier: Apache-2.0
"""How well a causal language model predicts a text: perplexity and bits per byte.

One figure for one (model, text, window, stride): no sampling, no padding, one window at a time, so
formats and kernels can be compared to the fourth digit. Not a benchmark of speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Perplexity", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text; nats are natural-log units, summed in float64."""

    total_nats: float
    num_tokens: int  # tokens that were predicted
    num_bytes: int  # bytes of text that these tokens stand for

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token."""
        return math.exp(self.total_nats / self.num_tokens)

    @property
    def perplexity_per_byte(self) -> float:
        """exp of the mean loss of a byte: comparable between tokenizers."""
        return math.exp(self.total_nats / self.num_bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.total_nats / self.num_bytes / math.log(2)


def perplexity(
    model: Any,
    text: str | Tensor,
    tokenizer: Any = None,
    *,
    window: int = 512,
    stride: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Every token after the first is predicted once, from at least window - stride tokens.

    model      a Hugging Face causal language model; model(input_ids=[1, T]).logits is [1, T, V]
    text       a str (then tokenizer is needed), or token ids: [num_tokens] or [1, num_tokens]
               of any integer dtype, of which num_bytes is taken to be num_tokens - 1
    tokenizer  tokenizer(text)["input_ids"]; its beginning-of-text token, if it has one, is put
               before the text, so that the first byte is predicted too
    window     most tokens the model sees at once; at most its max_position_embeddings
    stride     tokens that the window moves on; tokens near the text's start have less context
    progress   called as progress(tokens done, tokens in all) after each window

    The loss is computed in float32 from the logits as they are and summed in float64. The model's
    training mode is put back afterwards.
    Raises ValueError if the text has no token to predict, or window and stride make no sense.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride: expected 1 <= stride < window={window}, got {stride}")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise ValueError(f"window: the model takes at most {limit} tokens, got {window}")
    ids, num_bytes = _token_ids(text, tokenizer)
    num_targets = ids.numel() - 1
    if num_targets < 1:
        raise ValueError("text: expected at least two tokens (one to predict), got fewer")
    ids = ids.to(device=model.get_input_embeddings().weight.device)
    was_training = model.training
    model.eval()
    total, done = 0.0, 0
    try:
        with torch.no_grad():
            while done < num_targets:
                # targets done + 1 .. end, seen after the tokens from start on
                end = min(num_targets, done + stride) if done else min(num_targets, window)
                start = max(0, end - window)
                logits = model(input_ids=ids[None, start:end], use_cache=False).logits[0]
                scored = logits[done - start :].float()
                loss = F.cross_entropy(scored, ids[done + 1 : end + 1], reduction="none")
                total += loss.double().sum().item()
                done = end
                if progress:
                    progress(done, num_targets)
    finally:
        model.train(was_training)
    return Perplexity(total, num_targets, num_bytes)


def _token_ids(text: str | Tensor, tokenizer: Any) -> tuple[Tensor, int]:
    """([num_tokens] int64, bytes that the predicted tokens stand for)."""
    if isinstance(text, Tensor):
        return text.reshape(-1).long(), text.numel() - 1
    if tokenizer is None:
        raise ValueError("tokenizer: needed to make tokens of a str; give one, or token ids")
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    num_bytes = len(text.encode())
    if tokenizer.bos_token_id is not None:
        ids.insert(0, tokenizer.bos_token_id)
    elif ids:  # the first token is context only
        num_bytes -= len(tokenizer.decode(ids[:1]).encode())
    return torch.tensor(ids, dtype=torch.int64), num_bytes
