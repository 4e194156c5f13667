# SPDX-License-Identifier: Apache-2.0
"""A tokenizer whose ids are the bytes of UTF-8, as a Hugging Face tokenizer folder.

BPE without merges over ByteLevel's alphabet; id 256 is the end of text. Text that happens to spell
the special token is encoded as bytes like any other, so every text survives a round trip.
"""

from __future__ import annotations

from pathlib import Path

from tiny import END_OF_TEXT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT_NAME = "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The printable character that ByteLevel writes for each byte: [256].

    Printable Latin-1 stands for itself, the other bytes follow from U+0100 on in their order (the
    table of GPT-2's encoder).
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in itself else next(others)) for byte in range(256)]


def byte_tokenizer(max_context: int) -> PreTrainedTokenizerFast:
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT_NAME, special=True, normalized=False)])
    assert tokenizer.token_to_id(END_OF_TEXT_NAME) == END_OF_TEXT
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT_NAME,
        eos_token=END_OF_TEXT_NAME,
        pad_token=END_OF_TEXT_NAME,
        model_max_length=max_context,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def save(folder: Path, max_context: int) -> None:
    """tokenizer.json and tokenizer_config.json into folder."""
    byte_tokenizer(max_context).save_pretrained(folder)
