# SPDX-License-Identifier: Apache-2.0
"""`expertyard plan`: exit codes, streams, JSON, and that it is quick and imports nothing heavy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from expertyard.cli.plan import main
from expertyard.plan import Plan

PYTHON = str(Path(__file__).parent.parent / "python")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from expertyard.cli.plan import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": PYTHON, "PATH": "/usr/bin:/bin"},
        check=False,
    )


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Qwen3-30B-A3B", "--memory", "cuda:0=24GiB,cpu=64GiB"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in (
        "Qwen3-30B-A3B",
        "cuda:0",
        "cpu",
        "workspace",
        "KV",
        "read/token",
        "tokens/s",
        "why",
    ):
        assert word in out


def test_json_is_the_fixed_schema(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    assert main(["Mixtral-8x7B", "-n", "0:16;1:16", "--json", "--save", str(saved)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == 1
    assert data["model"] == "Mixtral-8x7B"
    assert data["num_layers"] == len(data["layers"]) == 32
    assert data["transfers"] == {"16": "cuda:1"}
    layer = data["layers"][16]
    assert {k: layer[k] for k in ("layer", "device", "dense_format", "why")} == {
        "layer": 16,
        "device": "cuda:1",
        "dense_format": "bf16",
        "why": "--layers 1:16",
    }
    (group,) = layer["experts"]
    assert group["ids"] == "0-7"
    assert set(group) >= {"ids", "device", "format", "op", "prefill_op", "out_device", "why"}
    use = data["devices"]["cuda:0"]
    for key in (
        "capacity",
        "weights",
        "experts",
        "kv",
        "workspace",
        "reserved",
        "free",
        "read_per_token",
    ):
        assert isinstance(use[key], int)
    assert Plan.load(saved) == Plan.from_json(data)


def test_dense_layers_have_no_experts_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["DeepSeek-V3", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert ["experts" in layer for layer in layers] == [False] * 3 + [True] * 58


def test_strict_turns_warnings_into_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Mixtral-8x7B", "-n", "500"]) == 0
    assert main(["Mixtral-8x7B", "-n", "500", "--strict"]) == 1
    assert main(["Mixtral-8x7B", "-n", "16", "--strict"]) == 0
    assert "clamped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        ["NoSuchModel"],
        ["./no/such/folder"],
        ["Mixtral-8x7B", "-n", "0:a"],
        ["Mixtral-8x7B", "--rules", "nowhere.yaml"],
        ["Mixtral-8x7B", "--memory", "cuda:0"],
        ["Mixtral-8x7B", "--memory", "cuda:0=1GiB,cpu=1GiB"],
        ["Mixtral-8x7B", "--format", "int5"],
        ["Mixtral-8x7B", "--context", "0"],
        ["Mixtral-8x7B", "-n", "3:1", "--memory", "cpu=200GiB"],
        ["Mixtral-8x7B", "--save", "/nowhere/at/all.json"],
        ["Mixtral-8x7B", "--svg", "/nowhere/at/all.svg"],
        ["Mixtral-8x7B", "--what-if=--nothing"],
        ["Mixtral-8x7B", "--what-if", "--context x"],
        ["Mixtral-8x7B", "--what-if", "'"],
        ["Mixtral-8x7B", "--export", "toml"],
        ["Mixtral-8x7B", "--export", "kt", "--json"],
        ["Mixtral-8x7B", "--plan", "nowhere.json"],
        ["Mixtral-8x7B", "--mb-resrv-per-gpu", "x", "--memory", "cuda:0=99GiB"],
    ],
)
def test_an_error_is_one_sentence_on_stderr_and_exit_2(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err and err.count("\n") == 1 and len(err) > 20


def test_usage_errors_exit_2_too() -> None:
    done = run("Mixtral-8x7B", "--no-such-flag")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


def test_llama_cpps_ngl_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["Mixtral-8x7B", "-ngl", "99", "-ot", "exps=CPU"])
    out, err = capsys.readouterr()
    assert out == "" and "leave it out" in err


def test_help_has_examples() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout and "--rules" in done.stdout


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from expertyard.cli.plan import main; main(['Mixtral-8x7B', '--json']);"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'yaml'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": PYTHON},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_plan_takes_half_a_second_of_cpu_at_most(tmp_path: Path) -> None:
    import resource

    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("OLMoE", "--memory", "cuda:0=8GiB,cpu=32GiB").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.5  # importing torch alone takes longer


def test_the_plan_subcommand_can_be_added_to_a_parser() -> None:
    import argparse

    from expertyard.cli import plan

    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    args: Any = parser.parse_args(["plan", "OLMoE", "--json"])
    assert args.run is plan.run and args.target == "OLMoE"


def test_a_saved_plan_is_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = str(tmp_path / "plan.json")
    assert main(["OLMoE", "--gpu-experts", "8", "--save", saved, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["OLMoE", "--plan", saved, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == first["layers"]


def test_what_if_compares_two_requests(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["Qwen3-30B-A3B", "--memory", "cuda:0=24GiB,cpu=64GiB", "--what-if", "--format int4"]
    assert main(args) == 0
    out = capsys.readouterr().out
    for word in ("this request", "what if", "tokens/s", "layers placed otherwise"):
        assert word in out
    assert main([*args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    formats = [data["layers"][0]["experts"][0], data["what_if"]["layers"][0]["experts"][0]]
    assert [group["format"] for group in formats] == ["bf16", "int4"]


def test_what_if_takes_a_single_flag_too(capsys: pytest.CaptureFixture[str]) -> None:
    from expertyard.cli import main as expertyard

    for args in (["--what-if", "--cpu-moe"], ["--what-if=--cpu-moe"]):
        assert main(["OLMoE", "-n", "16", "--json", *args]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["what_if"]["layers"][3]["experts"][0]["device"] == "cpu"
        assert expertyard(["plan", "OLMoE", "-n", "16", *args]) == 0
        assert "what if" in capsys.readouterr().out


def test_layers_that_differ_only_in_their_cache_share_a_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["gpt-oss-20b", "--context", "32768", "--cpu-moe"]) == 0
    assert "0-23    cuda:0 bf16  32 on cpu bf16" in capsys.readouterr().out
    assert main(["Llama-4-Maverick", "--cpu-moe"]) == 0
    assert "1, 3, 5, 7" in capsys.readouterr().out


def test_many_foreign_rules_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yaml"
    rule = (
        "- match: {{name: '^model.layers.{}.self_attn$'}}\n  replace: {{class: KLlamaAttention}}\n"
    )
    rules.write_text("".join(rule.format(i) for i in range(9)))
    assert main(["OLMoE", "--rules", str(rules)]) == 0
    assert capsys.readouterr().out.count("foreign-rule") == 1
    assert main(["OLMoE", "--rules", str(rules), "--json"]) == 0
    codes = [finding["code"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert codes.count("foreign-rule") == 9


def test_exports_print_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Mixtral-8x7B", "-n", "0:16;1:16", "--export", "ord"]) == 0
    assert capsys.readouterr().out == "0:16;1:16\n"


def test_the_picture_is_xml_with_every_device(tmp_path: Path) -> None:
    import xml.etree.ElementTree as ET

    path = tmp_path / "plan.svg"
    profile = tmp_path / "p.json"
    profile.write_text(json.dumps([[e + 1 for e in range(64)] for _ in range(16)]))
    memory = ["--memory", "cuda:0=4GiB,cpu=64GiB", "--profile", str(profile)]
    assert main(["OLMoE", *memory, "--strategy", "frequency", "--svg", str(path)]) == 0
    root = ET.parse(path).getroot()
    text = "".join(root.itertext())
    assert "cuda:0" in text and "cpu" in text and "OLMoE" in text
    shades = {rect.get("fill-opacity") for rect in root.iter("{http://www.w3.org/2000/svg}rect")}
    assert len(shades) > 4


def test_an_error_writes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    args = ["OLMoE", "--gpu-experts", "8", "--export", "ord", "--save", str(path)]
    assert main(args) == 2 and not path.exists()
