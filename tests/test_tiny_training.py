# SPDX-License-Identifier: Apache-2.0
"""examples/tiny_moe trains a model from text, can be interrupted, and reads POD like a reader."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_moe"
SMALL = {
    "hidden-size": 32,
    "num-layers": 2,
    "num-heads": 2,
    "num-kv-heads": 1,
    "num-experts": 4,
    "top-k": 2,
    "intermediate-size": 16,
    "max-context": 64,
    "batch-size": 4,
    "seq-len": 32,
    "warmup": 4,
    "lr": 1e-2,
    "save-every": 10,
    "source": "perl",
    "precision": "fp32",
}


@pytest.fixture(scope="module", autouse=True)
def example() -> Any:
    """The example's modules can be imported by their names, as they are when it is run."""
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))
    for file in EXAMPLE.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pods")
    pick = random.Random(0)
    vocabulary = ["the", "kernel", "an", "expert", "of", "token", "takes", "gives", "weight"]
    for i in range(8):
        lines = (" ".join(pick.choices(vocabulary, k=12)) for _ in range(30))
        text = f"=head1 NAME\n\npage{i}\n\n" + "\n\n".join(lines) + "\n\n=cut\n"
        (folder / f"page{i}.pod").write_text(text)
    return folder


def run(out: Path, pods: Path, *options: str) -> int:
    import train

    small = [f"--{name}={value}" for name, value in SMALL.items()]
    return train.main([*small, "--no-facts", "--pods", str(pods), "--out", str(out), *options])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def last_loss(folder: Path) -> float:
    return float(json.loads((folder / "facts.json").read_text())["training"]["last_loss"])


def test_the_loss_falls_and_the_folder_loads(tmp_path: Path, pods: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run(tmp_path / "short", pods, "--steps", "1") == 0
    assert run(tmp_path / "long", pods, "--steps", "40") == 0
    assert last_loss(tmp_path / "short") == pytest.approx(5.55, abs=0.2)  # ln 257: knows nothing
    assert last_loss(tmp_path / "long") < 3.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "long")) == model.config.vocab_size == 257
    assert not list((tmp_path / "long").glob("checkpoint*"))


def test_an_interrupted_run_goes_on_to_the_same_weights(
    tmp_path: Path, pods: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny

    assert run(tmp_path / "whole", pods, "--steps", "24") == 0
    losses, calls = tiny.losses, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 16:
            raise KeyboardInterrupt
        return losses(*args)

    monkeypatch.setattr(tiny, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", pods, "--steps", "24")
    monkeypatch.setattr(tiny, "losses", losses)
    assert run(tmp_path / "parts", pods, "--steps", "24", "--resume") == 0
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=2e-2, atol=1e-4, msg=name)


def test_a_resume_that_cannot_be_is_a_sentence(
    tmp_path: Path, pods: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, pods, "--steps", "2", "--resume") == 2
    assert "no checkpoint there" in capsys.readouterr().out
    assert run(tmp_path, tmp_path, "--steps", "2") == 2
    assert "no text found" in capsys.readouterr().out


def test_batches_cover_an_epoch_once_and_do_not_depend_on_history() -> None:
    import tiny

    tokens = torch.arange(1000, dtype=torch.int16)
    seen = torch.cat([tiny.batch(tokens, n, 4, 16, seed=3).flatten() for n in range(14)])
    assert len(seen.unique()) == len(seen) == 14 * 4 * 17
    assert torch.equal(tiny.batch(tokens, 20, 4, 16, 3), tiny.batch(tokens, 20, 4, 16, 3))
    assert not torch.equal(tiny.batch(tokens, 20, 4, 16, 3), tiny.batch(tokens, 6, 4, 16, 3))
    with pytest.raises(ValueError, match="too few for one batch"):
        tiny.batch(tokens, 0, 100, 16, 3)


def test_balance_loss_is_one_when_even_and_grows_with_every_layer_s_favourite() -> None:
    import tiny

    even = torch.eye(4).repeat(8, 1) * 20
    first, second = torch.zeros(32, 4), torch.zeros(32, 4)
    first[:, 0] = second[:, 1] = 20
    assert tiny.balance_loss((even, even), 1).item() == pytest.approx(1.0, abs=1e-3)
    assert tiny.balance_loss((first, second), 1).item() == pytest.approx(4.0, abs=1e-3)


@pytest.mark.parametrize(
    ("pod", "text"),
    [
        ("=head1 NAME\n\nperl - the\nlanguage\n\n=cut\n\ncode", "NAME\n\nperl - the language"),
        ("=pod\n\nB<Bold I<both>> and C<< $a->{b} >>.", "Bold both and $a->{b}."),
        ("=pod\n\nC<<< a >> b >>> E<lt>E<gt>E<eacute>E<233>E<0x263A>", "a >> b <>éé☺"),
        ("=pod\n\nSee L<here|perlre>, L<perlre/Notes>, L<perlop>, L</Up>", "See here, Notes in"),
        ("=pod\n\nL<https://example.org/a>", "https://example.org/a"),
        ("=pod\n\nOneX<index>\n\n  verbatim();\n\nTwo", "One\n\nTwo"),
        ("=over 4\n\n=item *\n\nfirst\n\n=item 2.\n\n=item name\n\n=back", "first\n\nname"),
        ("=pod\n\n=begin html\n\n<b>\n\n=end html\n\n=for me a\n\nText", "Text"),
        ("=pod\n\nif A<b or x", "if A<b or x"),
    ],
)
def test_pod_becomes_what_a_reader_sees(pod: str, text: str) -> None:
    import corpus

    assert corpus.pod_to_text(pod).startswith(text)


def test_held_out_text_is_not_in_training() -> None:
    import corpus

    old = "A sentence that release notes repeat from one version of the language to the next."
    new = "Another sentence about quite different things which nobody has ever written down yet."
    training = [corpus.Document("a", f"x\n\n{old}")]
    held_out = [corpus.Document("b", f"NAME\n\n{old}\n\n{new}"), corpus.Document("c", old)]
    assert corpus.without_repeats(held_out, training) == [corpus.Document("b", f"NAME\n\n{new}")]


def test_a_sample_has_whole_paragraphs_of_every_free_document() -> None:
    import corpus

    documents = [
        corpus.Document("a", "\n\n".join(["aaaa"] * 50)),
        corpus.Document("b", "bbbb\n\nbb"),
        corpus.Document("c", "cc\n\nCOPYRIGHT\n\nmine"),
    ]
    sample = corpus.sample(documents, 60)
    assert len(sample.encode()) <= 60
    assert set(sample.split()) == {"aaaa", "bbbb", "bb"}


def test_python_s_own_documentation_is_a_corpus_too(tmp_path: Path) -> None:
    import corpus

    source = tmp_path / "module.py"
    source.write_text(
        '"""A module.\n\n    >>> code\n"""\ndef f():\n    "Return\n    one."\n'.replace(
            '"Return\n    one."', '"""Return\n    one."""'
        )
    )
    assert corpus._docstrings(source) == "A module.\n\nReturn one."
