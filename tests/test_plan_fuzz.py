# SPDX-License-Identifier: Apache-2.0
"""Whatever is typed or lies in a file, `expertyard plan` plans or says one sentence; never a
traceback, never half an answer.
"""

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from expertyard.cli import main

FILES = ("--rules", "--topology", "--device-map", "--profile", "--plan")
WORDS = (
    "-n", "-ot", "--n-cpu-moe", "--gpu-experts", "--strategy", "--memory", "--mb-resrv-per-gpu",
    "--format", "--dense-format", "--context", "--batch", "--bandwidth", "--priority", "--export",
    "--what-if", "--device-map", "--rules", "--topology", "--profile", "--plan",
)  # fmt: skip


def run(*args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `expertyard plan`."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", how, write_through=True)
                for how in ("strict", "backslashreplace"))  # fmt: skip
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(["plan", *args])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore


def check(*args: str) -> None:
    code, out, err = run(*args)
    assert code in (0, 1, 2), args
    if code == 2:
        assert out == "" and err.strip() and "Traceback" not in err, (args, out, err)
    else:
        assert out and not err, (args, err)


near = st.text("0123456789:;,=.-_%/ cudapCUDAGiBMoTegxblks[](){}|*+?^$\\dfnw", max_size=24)
anything = st.text(st.characters(exclude_categories=()), max_size=24)
good = st.sampled_from(
    ["0:4;1:4", "16", "exps=CPU", r"blk\.[0-3]\.=CUDA0,exps=CPU", "25%", "0-3,9", "cuda:0=24GiB",
     "cuda:0=9GiB,cpu=64GiB", "512,512", "0=512", "int4-g32", "fp8-channel", "frequency", "auto",
     "kt", "ot", "device_map", "--cpu-moe", "--context 99", "cuda:1,cuda:0", "machine"]
)  # fmt: skip
word = good | near | anything


@given(st.lists(st.tuples(st.sampled_from(WORDS), word), min_size=1, max_size=3), st.booleans())
@example([("-ot", "exps\udcff=CPU")], False)
@example([("-ot", "[0-\udcff]=CPU")], True)
@example([("-n", "0\x1f")], False)
@example([("--memory", "0\x1f=1GiB")], False)
@example([("--memory", "cuda:0=\u0663GiB")], False)
@example([("--priority", "cuda:0,cuda:0")], False)
@example([("-ot", "(a" * 200 + ")" * 200 + "=CPU")], False)
@example([("--gpu-experts", "0-999999999")], False)
@example([("--profile", "\x00")], False)
@example([("--rules", "a" * 5000)], False)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_anything_on_the_command_line(options: list[tuple[str, str]], as_json: bool) -> None:
    words = [part for flag, value in options for part in (f"{flag}={value}",)
             if flag.startswith("--")]  # fmt: skip
    words += [f"{flag}{value}" for flag, value in options if flag == "-n"]
    words += [part for flag, value in options if flag == "-ot" for part in (flag, f" {value}")]
    check("OLMoE", *words, *(["--json"] if as_json else []))


@given(anything | near)
@example("")
@example("/")
@example("a" * 5000)
@example("\x00.json")
@settings(max_examples=60, deadline=None)
def test_any_target(target: str) -> None:
    check("--", target)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | near | anything,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(near | anything, inner, max_size=4),
    max_leaves=10,
)
layer_keys = st.sampled_from(
    ["0-8", "8-16", "3", "/experts/", "/[/", "5-2", "a", 7, -1, True, None]
)
rule = st.fixed_dictionaries(
    {
        "match": st.dictionaries(
            st.sampled_from(["name", "class", "nam"]),
            st.sampled_from([r"\.experts$", "^model", "(", "torch.nn.Linear", 4, None]) | values,
        ),
        "replace": st.dictionaries(
            st.sampled_from(["class", "kwargs", "x"]),
            st.sampled_from(["default", "a.KTransformersExperts"])
            | st.dictionaries(
                st.sampled_from(["generate_device", "generate_op", "transfer_map", "format"]),
                st.sampled_from(["cpu", "cuda:1", "KExpertsCPU", "int4-g32"]) | values,
            ),
        ),
    }
)
documents = (
    values
    | st.lists(rule | values, max_size=3)
    | st.dictionaries(
        layer_keys,
        st.dictionaries(st.sampled_from(["isq", "device"]), near | values) | values,
        max_size=3,
    )
    | st.dictionaries(
        st.sampled_from(["", "model", "model.layers.3", "lm_head", "counts", "tokens", "schema"]),
        values | st.sampled_from(["cpu", 0, 1, "disk"]),
        max_size=4,
    )
)


@given(st.sampled_from(FILES), documents, st.sampled_from(["yaml", "json"]))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_document_in_a_file(flag: str, document: Any, kind: str) -> None:
    try:
        text = json.dumps(document) if kind == "json" else yaml.safe_dump(document)
    except (TypeError, ValueError, yaml.YAMLError):
        return  # not every mixture of keys can be written
    check_file(flag, text.encode("utf-8", "surrogatepass"))


@given(st.sampled_from(FILES), st.binary(max_size=60) | near.map(str.encode))
@example("--rules", b"- &a [*a]")
@example("--rules", b"- match: {name: '(?P<n>a)(?P<n>b)'}\n  replace: {}\n")
@example("--topology", b"? [1, 2]\n: {device: cpu}\n")
@example("--topology", b"0-5: {device: !!python/name:os.system ''}\n")
@example("--topology", b"1e400: {device: cpu}\n")
@example("--topology", b"2001-01-01: {device: cpu}\n")
@example("--device-map", b'{"": 1e400}')
@example("--device-map", b"9" * 5000)
@example("--profile", b"layer,expert,count\n1e400,0,1\n")
@example("--profile", b"layer,expert,count\nnan,nan,nan\n")
@example("--profile", b'{"tokens": [[[[]]]]}')
@example("--plan", b"[" * 5000)
@example("--plan", b'{"schema": 1, "layers": [1]}')
@settings(max_examples=250, deadline=None)
def test_any_bytes_in_a_file(flag: str, data: bytes) -> None:
    check_file(flag, data)


def check_file(flag: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input"
        path.write_bytes(data)
        check("OLMoE", f"{flag}={path}")


@pytest.mark.parametrize("flag", FILES)
def test_a_folder_is_no_file(flag: str, tmp_path: Path) -> None:
    code, out, err = run("OLMoE", flag, str(tmp_path))
    assert code == 2 and out == "" and re.search(r"directory|cannot be read", err)
