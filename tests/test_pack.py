# SPDX-License-Identifier: Apache-2.0
"""`expertyard pack`: the same model, loaded by mapping files; interrupted, resumed, checked."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

import expertyard as ey
from expertyard.cli import main
from expertyard.errors import ConfigError, LoadError, PlanError
from expertyard.hf import pack as packing
from expertyard.hf.pack import pack
from expertyard.linear import PackedLinear
from expertyard.loading.packed_folder import MANIFEST
from hf_families import load, logits, prompts, save, tiny_model
from test_from_pretrained import SIZES, quantised
from test_hf_memory import file_ranges


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    model = tiny_model("qwen3_moe", torch.bfloat16, mlp_only_layers=[], **SIZES)
    return save(model, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory):
    return pack(plain, tmp_path_factory.mktemp("packed"), "int4-g32").folder


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def same(folder, other, **options):
    batch = prompts()
    got = logits(ey.from_pretrained(folder, dtype=torch.float32), batch)
    return torch.equal(
        got, logits(ey.from_pretrained(other, dtype=torch.float32, **options), batch)
    )


def test_the_packed_model_is_the_one_that_loading_gives(plain, packed):
    assert same(packed, plain, format="int4-g32")


def test_transformers_loads_it_by_itself(packed):
    batch = prompts()
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    assert {row.format for row in ey.verify(model).layers} == {"int4-g32"}
    expected = ey.from_pretrained(packed, dtype=torch.float32)
    assert torch.equal(logits(model, batch), logits(expected, batch))


def test_its_experts_are_the_mapped_file(packed):
    model = ey.from_pretrained(packed)
    ranges = file_ranges(packed)
    for row in ey.verify(model).layers:
        w13, _, w2 = model.get_submodule(row.name).experts.parts[0].packed._matrices
        for blob in (*w13, *w2):
            assert blob.data_ptr() % 64 == 0
            assert any(low <= blob.data_ptr() < high for low, high in ranges)


@pytest.mark.parametrize("layout", ["fp8", "mxfp4", "awq", "compressed-tensors"])
def test_quantised_experts_are_packed_as_they_are(tmp_path, layout):
    folder, _ = quantised(tmp_path, layout)
    assert same(pack(folder, tmp_path / "out").folder, folder)


@pytest.mark.parametrize("layout", ["fp8", "awq", "compressed-tensors"])
def test_other_quantised_layers_are_packed_as_they_are(tmp_path, layout):
    folder, _ = quantised(tmp_path, layout, dense=True)
    packed = pack(folder, tmp_path / "out")
    assert same(packed.folder, folder)
    model = AutoModelForCausalLM.from_pretrained(packed.folder, dtype=torch.float32)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert (
        layers.keys() == packed.matrices.keys()
        and len(layers) == 4 * model.config.num_hidden_layers
    )
    ranges = file_ranges(packed.folder)
    for layer in layers.values():
        assert layer.packed.data_ptr() % 64 == 0
        assert any(low <= layer.packed.data_ptr() < high for low, high in ranges)
    # and as plain numbers, whenever that is asked for
    batch = prompts()
    plain = ey.from_pretrained(folder, dtype=torch.float32, dense="plain")
    for other in (
        ey.from_pretrained(packed.folder, dtype=torch.float32, dense="plain"),
        ey.from_pretrained(
            pack(folder, tmp_path / "plainly", dense="plain").folder, dtype=torch.float32
        ),
    ):
        assert not any(isinstance(m, PackedLinear) for m in other.modules())
        assert torch.allclose(logits(other, batch), logits(plain, batch), rtol=1e-4, atol=1e-4)


def test_packing_other_layers_goes_on_where_it_was(tmp_path, monkeypatch):
    folder, _ = quantised(tmp_path, "awq", dense=True)
    monkeypatch.setattr(packing, "_KEPT_SHARD", 20_000)
    write, done = packing._write_kept, []

    def interrupted(opened, kept, names, path):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path.name)
        return write(opened, kept, names, path)

    monkeypatch.setattr(packing, "_write_kept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "out")
    with pytest.raises(LoadError):  # not finished: no packed folder
        ey.from_pretrained(tmp_path / "out")
    first = tmp_path / "out" / done[0]
    with first.open("r+b") as file:  # and one of the two is damaged meanwhile
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    again = []
    monkeypatch.setattr(
        packing, "_write_kept", lambda *args: again.append(args[3].name) or write(*args)
    )
    packed = pack(folder, tmp_path / "out")
    names = {matrix.file for matrix in packed.matrices.values()}
    assert set(again) == names - {done[1]} and len(names) > 3
    packed.verify()
    assert same(packed.folder, folder)


def test_packed_layers_that_the_model_does_not_have_are_named(tmp_path):
    folder, _ = quantised(tmp_path, "awq", dense=True)
    packed = pack(folder, tmp_path / "out").folder
    manifest = json.loads((packed / MANIFEST).read_text())
    name = next(iter(manifest["matrices"]))
    for change in (
        lambda m: m.update({"model.nowhere": m.pop(name)}),
        lambda m: m[name].update(rows=m[name]["rows"] + 32),
        lambda m: m[name].update(scale_type="fp64"),
        lambda m: m[name].update(file="../elsewhere.safetensors"),
        lambda m: m[name].update(format="int3"),
    ):
        damaged = json.loads(json.dumps(manifest))
        change(damaged["matrices"])
        (packed / MANIFEST).write_text(json.dumps(damaged))
        with pytest.raises(LoadError, match=MANIFEST):
            ey.from_pretrained(packed)


def test_everything_else_comes_along(plain, packed):
    names = {file.name for file in packed.iterdir()}
    assert {"config.json", "generation_config.json", MANIFEST} <= names
    assert not any(name.endswith(".tmp") or "partial" in name for name in names)


def test_interrupted_packing_goes_on(plain, tmp_path, monkeypatch):
    out = tmp_path / "out"
    done = []
    real = packing._pack_layer

    def once(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return real(*args)

    monkeypatch.setattr(packing, "_pack_layer", once)
    with pytest.raises(KeyboardInterrupt):
        pack(plain, out, "int4-g32")
    with pytest.raises(LoadError):
        ey.from_pretrained(out)
    packed_again = []

    def count(*args):
        packed_again.append(args)
        return real(*args)

    monkeypatch.setattr(packing, "_pack_layer", count)
    pack(plain, out, "int4-g32")
    assert len(packed_again) == 1  # of two layers
    assert same(out, plain, format="int4-g32")


def test_a_layer_that_changed_meanwhile_is_packed_again(plain, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = packing._write_dense
    monkeypatch.setattr(packing, "_write_dense", lambda *a: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        pack(plain, out, "int4-g32")
    file = out / "experts-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(packing, "_write_dense", real)
    pack(plain, out, "int4-g32").verify()
    assert same(out, plain, format="int4-g32")


def test_a_file_that_is_being_written_has_no_name_yet(plain, tmp_path, monkeypatch):
    def failing(*args, **keywords):
        raise RuntimeError

    monkeypatch.setattr(packing, "assemble", failing)
    with pytest.raises(RuntimeError):
        pack(plain, tmp_path / "out", "int4")
    assert list((tmp_path / "out").iterdir()) == []


def test_another_job_does_not_mix_with_a_begun_one(plain, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_write_dense", lambda *a: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        pack(plain, tmp_path / "out", "int4")
    with pytest.raises(ConfigError, match="half-packed model, of another source or in another"):
        pack(plain, tmp_path / "out", "int8")
    with pytest.raises(ConfigError, match="holds another packed model"):
        pack(plain, packed, "int8")
    with pytest.raises(ConfigError, match="is packed already"):
        pack(packed, tmp_path / "again")


def test_a_folder_with_something_in_it_is_left_alone(plain, tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(ConfigError, match="is not empty"):
        pack(plain, tmp_path, "int4")


def test_plain_formats_are_refused(plain, tmp_path):
    with pytest.raises(ConfigError, match="used in place already"):
        pack(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["truncated", "missing", "header"])
def test_damaged_files_are_named(copy, what):
    file = copy / "experts-00001.safetensors"
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:8] + content[8:400].replace(b"blobs", b"globs") + content[400:])
    with pytest.raises(LoadError, match=r"experts-00001|blobs"):
        ey.from_pretrained(copy)


def test_a_flipped_bit_is_found_by_verify(copy, capsys):
    file = copy / "experts-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 16
    file.write_bytes(content)
    assert main(["pack", "--verify", str(copy)]) == 2
    assert (
        "experts-00001.safetensors: its content is not what was packed" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"layers": 3},
        {"files": {"../x": {"bytes": 1, "sha256": ""}}},
        {"files": {}},
    ],
)
def test_a_damaged_manifest_is_a_sentence(copy, change):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(LoadError, match=r"expertyard\.json"):
        ey.from_pretrained(copy)


def test_a_config_of_another_model_is_noticed(copy):
    config = json.loads((copy / "config.json").read_text())
    config["moe_intermediate_size"] = 64
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"intermediate_size: config\.json says 64"):
        ey.from_pretrained(copy)


def test_another_format_is_refused_at_loading(packed):
    with pytest.raises(PlanError, match="packed in 'int4-g32'"):
        ey.from_pretrained(packed, format="int8")


def test_the_command(plain, tmp_path, capsys):
    assert (
        main(["pack", str(plain), "-o", str(tmp_path / "o"), "--format", "int8", "--verify"]) == 0
    )
    assert "2 layers of experts in int8" in capsys.readouterr().out
    assert load(tmp_path / "o") is not None
    assert main(["pack", str(plain), "--format", "int8"]) == 2
    assert main(["pack", str(plain), "-o", str(tmp_path / "p"), "--format", "int5"]) == 2
    assert main(["pack", str(tmp_path / "nothing"), "-o", str(tmp_path / "q")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [("format", None), ("format", "int5"), ("scale_type", "none"), ("hidden_size", "x")],
)
def test_a_manifest_that_makes_no_sense_is_named(copy, field, value):
    manifest = json.loads((copy / MANIFEST).read_text())
    next(iter(manifest["layers"].values()))[field] = value
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LoadError) as caught:
        ey.from_pretrained(copy)
    assert MANIFEST in str(caught.value)


def test_a_manifest_without_layers_is_named(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["layers"] = {}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LoadError, match="names no layers"):
        ey.from_pretrained(copy)


def test_files_written_anew_without_alignment_are_named(copy):
    """As safetensors' own writer does, which knows nothing of 64 bytes."""
    file = copy / "experts-00000.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" "
    header += b" " * ((8 - (8 + len(header))) % 8)
    if len(header) % 64 == 56:  # still aligned by chance
        header += b" " * 8
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][file.name]["bytes"] = file.stat().st_size
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LoadError, match="expected to begin at a multiple of 64 bytes"):
        ey.from_pretrained(copy)


def test_packing_that_is_killed_at_any_moment_resumes(plain, packed, tmp_path):
    """kill -9: what is there never loads as a model until it is whole, and is then the same."""
    out = tmp_path / "out"
    code = (
        "import sys; import expertyard.hf.pack as pack; print('ready', flush=True);"
        "pack.pack(sys.argv[1], sys.argv[2], 'int4-g32')"
    )
    moments, kills = random.Random(0), 0
    for _ in range(4):
        command = [sys.executable, "-c", code, str(plain), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0, 0.08))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        if not (out / MANIFEST).exists():
            with pytest.raises(LoadError):
                ey.from_pretrained(out)
    assert kills
    pack(plain, out, "int4-g32").verify()
    for file in packed.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert {file.name for file in out.iterdir()} == {file.name for file in packed.iterdir()}
