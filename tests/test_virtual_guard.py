# SPDX-License-Identifier: Apache-2.0
"""Virtual GPUs: memory of their own that is counted, and transfers that cannot be forgotten."""

import gc

import pytest
import torch

from expertyard import virtual
from expertyard.devices import device_of, machine_memory, to_device
from expertyard.errors import ConfigError, DeviceError


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    monkeypatch.setenv(virtual.COUNT, "2")
    monkeypatch.setenv(virtual.MEMORY, "1MiB")


def test_what_is_put_there_is_a_copy_and_counted():
    gpu = virtual.gpu("cuda:1")
    before, tensor = gpu.used, torch.randn(10, 100)
    there = to_device(tensor, "cuda:1")
    assert torch.equal(there, tensor) and there.data_ptr() != tensor.data_ptr()
    assert device_of(there) == "cuda:1" and to_device(there, "cuda:1") is there
    assert gpu.used == before + 4000
    view = there[2:3]
    del there
    gc.collect()
    assert gpu.used == before + 4000, "a view keeps the memory"
    del view
    gc.collect()
    assert gpu.used == before


def test_a_full_gpu_says_how_many_bytes_are_missing():
    with pytest.raises(torch.OutOfMemoryError, match=r"cuda:0 \(virtual\): 4194304 bytes are need"):
        to_device(torch.zeros(1 << 20), "cuda:0")


def test_the_machine_has_them():
    memory = machine_memory()
    assert [*memory] == ["cuda:0", "cuda:1", "cpu"]
    assert memory["cuda:0"] == 1 << 20


@pytest.mark.parametrize("text", ["two", "-1", "65", "1.5"])
def test_a_wrong_number_is_a_sentence(text, monkeypatch):
    monkeypatch.setenv(virtual.COUNT, text)
    with pytest.raises(ConfigError, match=f"{virtual.COUNT}: expected a number from 0 to 64"):
        machine_memory()


def test_tensors_of_two_devices_do_not_mix():
    a, b = (to_device(torch.randn(3, 3), f"cuda:{i}") for i in range(2))
    with virtual.Guard("cuda:0"):
        product = (a @ a).relu().view(9)
        assert virtual.marked(product) == "cuda:0"
        with pytest.raises(DeviceError, match=r"expected tensors of one device, got \['cuda:0'"):
            product.view(3, 3) + b
        with virtual.at("cuda:1"):
            assert virtual.marked(torch.arange(3)) == "cuda:1"
        with pytest.raises(DeviceError):
            b[torch.arange(3)]
        assert virtual.marked(a + torch.tensor(2.0)) == "cuda:0", "single numbers may be anywhere"


def test_a_forgotten_transfer_of_a_model_is_found():
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    import expertyard as ey
    from expertyard.models import tiny_moe

    virtual.gpu("cuda:0")
    config = ey.ExpertsConfig(layers="0:2;1:2")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(virtual.MEMORY)
        model = AutoModelForCausalLM.from_pretrained(tiny_moe(), quantization_config=config)
        with virtual.Guard("cuda:0"), torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
            model.model.layers[2]._forward_pre_hooks.clear()
            with pytest.raises(DeviceError, match=r"got \['cuda:0', 'cuda:1'\]"):
                model(torch.tensor([[1, 2, 3]]))
