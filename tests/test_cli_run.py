# SPDX-License-Identifier: Apache-2.0
"""`expertyard run` loads by the plan, proves its kernels, generates; bad input is one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from expertyard.cli import main
from expertyard.models import tiny_moe

pytest.importorskip("transformers")

SHORT = ["--max-new-tokens", "6", "--prompt", "The function"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_moe(), folder)
    return folder


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command in this process."""
    code = main(["run", *words])
    return (code, *capfd.readouterr())


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The sentence; nothing may be on stdout."""
    code, out, err = run(capfd, *words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err.count("\n") == 1, f"one sentence, not {err!r}"
    return err


def test_plan_proof_text_and_speeds_are_printed(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, *SHORT)
    assert code == 0, err
    assert "tiny_moe: 4 layers" in out
    assert re.search(r"verified: bf16_\w+ on cpu runs 64 experts of 4 layers", out)
    assert "The function" in out
    speeds = re.search(r"prefill 12 tokens at (\d+) tokens/s, decode 6 tokens at ([\d.]+) tok", out)
    assert speeds, out
    assert float(speeds[2]) > 0
    assert err == "", "PyTorch and transformers have said something"


def test_the_text_is_what_transformers_writes(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, out, _ = run(capfd, *SHORT, "--temperature", "0")
    text = next(line for line in out.splitlines() if line.startswith("The function"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe())
    model = AutoModelForCausalLM.from_pretrained(tiny_moe(), dtype="auto")
    ids = tokenizer("The function", return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert text == tokenizer.decode(tokens[0])


def test_a_seed_decides_what_is_sampled(capfd: pytest.CaptureFixture[str]) -> None:
    def text(seed: str) -> str:
        _, out, _ = run(capfd, "--seed", seed, "--temperature", "2", "--max-new-tokens", "12")
        return out[out.index("If you want to") : out.index("\nprefill")]

    assert text("1") == text("1")
    assert text("1") != text("2")


def test_compare_names_both_peers_and_agrees(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, *SHORT, "--compare")
    assert code == 0
    assert re.search(r"^expertyard +\d+ ", out, re.MULTILINE)
    for peer in ("eager", "grouped_mm"):
        row = re.search(rf"^transformers {peer} .*$", out, re.MULTILINE)
        assert row, out
        assert row[0].rstrip().endswith("all 6"), row[0]
        assert len(re.findall(r"\d+\.\d\dx", row[0])) == 2


def test_placement_flags_reach_the_plan(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capfd, *SHORT, "--memory", "cpu=1GiB")
    assert re.search(r"^cpu .* 1\.00 ", out, re.MULTILINE), out
    assert "does not fit" in refused(capfd, *SHORT, "--memory", "cpu=1MiB")


def test_a_gpu_that_is_not_there_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert "cuda:77" in refused(capfd, *SHORT, "--layers", "77:4")


def test_a_path_that_is_no_model_is_said(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, copy: Path
) -> None:
    assert "no such folder" in refused(capfd, str(tmp_path / "nowhere"))
    assert "hf download" in refused(capfd, "nobody/no-such-model")
    assert "no config.json" in refused(capfd, str(tmp_path))
    assert "is a file" in refused(capfd, str(copy / "config.json"))
    (copy / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(capfd, str(copy))


def test_a_dense_model_is_refused(capfd: pytest.CaptureFixture[str], copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    dense = {k: v for k, v in config.items() if "expert" not in k}
    (copy / "config.json").write_text(json.dumps({**dense, "model_type": "qwen3"}))
    assert "not a mixture-of-experts model" in refused(capfd, str(copy))


def test_damaged_files_are_named(capfd: pytest.CaptureFixture[str], copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refused(capfd, str(copy))
    weights.write_bytes(whole)
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer" in refused(capfd, str(copy))
    (copy / "config.json").write_text("{")
    assert "config.json" in refused(capfd, str(copy))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: expected 1 or more, got 0"),
        (["--max-new-tokens", "2000"], "the 1024 positions of this model"),
        (["--temperature", "-1"], "--temperature: expected 0 or more"),
        (["--temperature", "nan"], "--temperature: expected 0 or more"),
        (["--threads", "0"], "--threads: expected 1 or more"),
        (["--prompt", ""], "--prompt: expected some text"),
        (["--chat"], "no chat template"),
        (["--rules", "no-such-file.yaml"], "no-such-file.yaml"),
        (["--format", "bf17"], "bf17"),
        (["--memory", "lots"], "lots"),
        (["--context", "0"], "context"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_wrong_value_is_one_sentence(
    capfd: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert sentence in refused(capfd, *words)


@pytest.mark.parametrize("isa", ["avx1024", "AVX2"])
def test_an_unknown_instruction_set_lists_those_that_are_there(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    monkeypatch.setenv("EXPERTYARD_ISA", isa)
    sentence = refused(capfd, *SHORT)
    assert isa in sentence
    assert "scalar" in sentence


def test_a_forced_instruction_set_is_the_one_that_runs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTYARD_ISA", "scalar")
    _, out, _ = run(capfd, *SHORT)
    assert "verified: bf16_scalar on cpu" in out


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_is_named_with_its_remedy(package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from expertyard.cli import main\n"
        "sys.exit(main(['run']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1] / "python"), "PATH": ""},
    )
    assert done.returncode == 2
    assert package in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_and_help_are_quick_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from expertyard import __version__

    for words, expected in (
        (["--version"], [__version__]),
        (["--help"], ["run", "plan", "doctor", "bench", "examples:"]),
        (["run", "--help"], ["examples:", "--prompt", "--rules", "--compare"]),
    ):
        with pytest.raises(SystemExit) as leave:
            main(words)
        assert leave.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in expected)


def test_an_unknown_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["fly"])
    assert leave.value.code == 2
    assert "'fly'" in capsys.readouterr().err


def test_virtual_gpus_are_explained_traced_and_recorded(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EXPERTYARD_VIRTUAL_GPUS", "2")
    trace, record = tmp_path / "trace.json", tmp_path / "record.json"
    words = ["--layers", "0:2;1:2", "--gpu-experts", "8", "--explain", "--temperature", "0"]
    code, out, err = run(capfd, *SHORT, *words, "--trace", str(trace), "--record", str(record))
    assert (code, err) == (0, "")
    assert re.search(r"verified: bf16_\w+ on cuda:1 runs 16 experts of 2 layers", out)
    assert re.search(r"layers 0-1, home cuda:0: 8 of 16 experts on cuda:0 by bf16_\w+", out)
    _, alone, _ = run(capfd, *SHORT, "--temperature", "0")
    lines = [text[text.index("The function") :].splitlines()[0] for text in (out, alone)]
    assert lines[0] == lines[1], "the text of a single device"
    assert re.search(
        r"trace: .* \(\d+ events, CPU and GPUs together for \d+% of the shorter\)", out
    )
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"cpu", "cuda:0", "cuda:1"}
    code, out, err = run(
        capfd, *SHORT, "--layers", "4", "--gpu-experts", "4", "--strategy", "frequency",
        "--profile", str(record), "--policy", "lru", "--measure",
    )  # fmt: skip
    assert code == 0, err
    assert "measured: 12 bf16 experts on the CPU are brought to cuda:0" in out
    assert Path(os.devnull).is_char_device(), "where the tests write crossovers: not replaced"


def test_deferral_says_its_error(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, *SHORT, "--defer", "1")
    assert code == 0
    assert re.search(r"deferred: up to 1 experts a token; .* at \d+ of 12 positions, mean KL", out)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--policy", "lur"], "Did you mean 'lru'"),
        (["--timeout", "0"], "timeout: expected seconds above 0"),
        (["--defer", "-1"], "defer: expected a whole number from 0"),
    ],
)
def test_a_wrong_option_of_running_is_one_sentence(
    capfd: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert sentence in refused(capfd, *words)


def test_a_folder_that_is_not_there_is_said_before_generating(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run(capfd, *SHORT, "--trace", str(tmp_path / "no" / "trace.json"))
    assert code == 2 and "there is no such folder" in err and "prefill 12" not in out
