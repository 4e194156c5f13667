# SPDX-License-Identifier: Apache-2.0
"""perplexity() scores every token after the first exactly once, with the context it promises."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from expertyard.models.perplexity import perplexity

VOCAB = 11


class Recorder(torch.nn.Module):
    """A model whose logits depend on the last three tokens, and that notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Embedding(VOCAB, VOCAB)
        self.table.weight.data = torch.randn(VOCAB, VOCAB, generator=generator)
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.lengths: list[int] = []

    def get_input_embeddings(self) -> Any:
        return self.table

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not self.training
        self.lengths.append(input_ids.shape[1])
        x = self.table(input_ids)
        past = torch.nn.functional.pad(x, (0, 0, 2, 0))
        return SimpleNamespace(logits=x + 0.5 * past[:, 1:-1] - 0.3 * past[:, :-2])


@pytest.mark.parametrize("num_tokens", [2, 3, 15, 16, 17, 20, 21, 100])
@pytest.mark.parametrize(("window", "stride"), [(16, 4), (16, 13), (64, 32)])
def test_windows_give_what_the_whole_text_gives(num_tokens: int, window: int, stride: int) -> None:
    ids = torch.randint(VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
    model = Recorder().train()
    result = perplexity(model, ids, window=window, stride=stride)
    assert model.training  # put back
    assert max(model.lengths) <= window
    logits = model.eval()(ids[None], use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="sum").item()
    assert result.num_tokens == num_tokens - 1
    assert result.total_nats == pytest.approx(expected, rel=1e-6)


def test_an_even_guess_has_the_vocabulary_as_perplexity() -> None:
    model = Recorder()
    model.table.weight.data.zero_()
    result = perplexity(model, torch.arange(10)[None], window=8, stride=4)
    assert result.perplexity == pytest.approx(VOCAB)
    assert result.bits_per_byte == pytest.approx(math.log2(VOCAB))
    assert result.perplexity_per_byte == pytest.approx(VOCAB)


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(
        Recorder(),
        torch.arange(40) % VOCAB,
        window=16,
        stride=8,
        progress=lambda *at: seen.append(at),
    )
    assert seen == [(16, 39), (24, 39), (32, 39), (39, 39)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (torch.arange(5), {"window": 8, "stride": 8}, "stride: expected"),
        (torch.arange(5), {"window": 8, "stride": 0}, "stride: expected"),
        (torch.arange(5), {"window": 65, "stride": 8}, "at most 64"),
        (torch.arange(1), {"window": 8, "stride": 4}, "at least two tokens"),
        ("hello", {"window": 8, "stride": 4}, "tokenizer: needed"),
    ],
)
def test_senseless_input_is_a_sentence(text: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(Recorder(), text, **options)
