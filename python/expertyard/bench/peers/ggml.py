# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's kernels: ggml out of an installed llama-cpp-python, whose libraries alone are loaded.
The layer is the graph that llama.cpp builds for it: three mul_mat_id, the activation between them,
the sum over top_k by views; weights lie in ggml's repacked form where it has one for their type.
"""

import ctypes
import weakref
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...reference import SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT
from ..layer import Layer
from .base import Parts, Peer, Run, converted, package_folder

# enum ggml_type, which files hold and so never changes
_F32, _Q4_0, _Q8_0, _Q4_K, _I32, _BF16, _MXFP4 = 0, 2, 8, 12, 26, 30, 39
_TENSORS = 256  # of a context, at most
_SUCCESS = 0


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_silence = _Log(lambda level, text, user: None)

# what is called: the result's type, then those of the arguments; all pointers are opaque
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_log_set": (None, _Log, c_void_p),
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead": (c_size_t,),
    "ggml_blck_size": (c_int64, c_int),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, *[c_void_p] * 2, *[c_int64] * 3, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, *[c_int64] * 2),
    "ggml_new_tensor_3d": (c_void_p, c_void_p, c_int, *[c_int64] * 3),
    "ggml_set_input": (None, c_void_p),
    "ggml_set_output": (None, c_void_p),
    "ggml_mul_mat_id": (c_void_p, *[c_void_p] * 4),
    "ggml_add_id": (c_void_p, *[c_void_p] * 4),
    "ggml_swiglu_split": (c_void_p, *[c_void_p] * 3),
    "ggml_swiglu_oai": (c_void_p, *[c_void_p] * 3, c_float, c_float),
    "ggml_mul": (c_void_p, *[c_void_p] * 3),
    "ggml_add": (c_void_p, *[c_void_p] * 3),
    "ggml_view_2d": (c_void_p, *[c_void_p] * 2, *[c_int64] * 2, *[c_size_t] * 2),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_gallocr_new": (c_void_p, c_void_p),
    "ggml_gallocr_free": (None, c_void_p),
    "ggml_gallocr_alloc_graph": (c_bool, c_void_p, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_set": (None, *[c_void_p] * 2, *[c_size_t] * 2),
    "ggml_backend_tensor_get": (None, *[c_void_p] * 2, *[c_size_t] * 2),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
}


class _Ggml:
    """The functions of _FUNCTIONS, without their prefix, out of the libraries of a folder."""

    def __init__(self, folder: Path) -> None:
        ctypes.CDLL(str(folder / "libggml-base.so"))
        library = ctypes.CDLL(str(folder / "libggml-cpu.so"))  # finds the other's functions too
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.log_set(_silence, None)
        self.backend = self.backend_cpu_init()
        self.plain = self.backend_cpu_buffer_type()

    def __getattr__(self, name: str) -> Any:  # for mypy: functions are set one by one
        raise AttributeError(name)

    def places(self) -> list[int]:
        """Buffer types to put weights into, repacked ones first."""
        name = b"ggml_backend_dev_get_extra_bufts"
        found = self.backend_reg_get_proc_address(self.backend_cpu_reg(), name)
        places: list[int] = []
        if found:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(found)
            list_ = extra(self.backend_get_device(self.backend))
            while list_[len(places)]:
                places.append(list_[len(places)])
        return [*places, self.plain]


def _absent() -> str | None:
    folder = package_folder("llama_cpp")
    if folder is None:
        return "llama-cpp-python is not installed"
    if not (folder / "lib" / "libggml-cpu.so").exists():
        return f"no libggml-cpu.so in {folder / 'lib'}"
    try:
        _load()
    except (OSError, AttributeError) as error:
        return f"its ggml is of another version: {error}"
    return None


@cache
def _load() -> _Ggml:
    folder = package_folder("llama_cpp")
    assert folder is not None
    return _Ggml(folder / "lib")


class _Context:
    """Tensors without data until place() puts them somewhere."""

    def __init__(self, ggml: _Ggml) -> None:
        self.ggml = ggml
        size = _TENSORS * ggml.tensor_overhead() + ggml.graph_overhead()
        self.pointer = ggml.init(_InitParams(size, None, True))
        weakref.finalize(self, ggml.free, self.pointer)

    def tensor(self, type_: int, *sizes: int) -> int:
        """sizes: the row's first, as ggml has them."""
        new = self.ggml.new_tensor_2d if len(sizes) == 2 else self.ggml.new_tensor_3d
        made: int = new(self.pointer, type_, *sizes)
        return made

    def place(self, buffer_type: int) -> None:
        """Gives every tensor its memory. Raises MemoryError."""
        ggml = self.ggml
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(self.pointer, buffer_type)
        if not buffer:
            raise MemoryError("ggml found no memory")
        weakref.finalize(self, ggml.backend_buffer_free, buffer)

    def fill(self, tensor: int, values: Tensor) -> None:
        size = values.numel() * values.element_size()
        self.ggml.backend_tensor_set(tensor, values.data_ptr(), 0, size)


class _Weights:
    """gate, up and down of a layer in one of ggml's types, and biases in fp32 if it has any."""

    def __init__(self, ggml: _Ggml, layer: Layer, type_: int) -> None:
        self.contexts: list[_Context] = []
        s = layer.shape
        hidden, inner, experts = s.hidden_size, s.intermediate_size, s.num_experts
        block = ggml.blck_size(type_)
        if hidden % block or inner % block:
            raise ValueError(f"takes whole blocks of {block} only")
        shapes = [(hidden, inner), (hidden, inner), (inner, hidden)]
        stacks = [
            torch.empty(experts, rows, ggml.row_size(type_, cols), dtype=torch.uint8)
            for cols, rows in shapes
        ]
        for expert, matrices in enumerate(converted(layer, partial(_rows, ggml, type_))):
            for stack, (matrix,) in zip(stacks, matrices, strict=True):
                stack[expert] = matrix
        self.matrices = []
        for sizes in shapes:
            self.matrices.append(self._put(ggml, type_, (*sizes, experts), stacks.pop(0)))
        self.biases = []
        for bias in (layer.gate_bias, layer.up_bias, layer.down_bias):
            if bias is not None:
                context = _Context(ggml)
                self.contexts.append(context)
                self.biases.append(context.tensor(_F32, bias.shape[1], experts))
                context.place(ggml.plain)
                context.fill(self.biases[-1], bias)

    def _put(self, ggml: _Ggml, type_: int, sizes: tuple[int, int, int], values: Tensor) -> int:
        """In the first place that ggml can multiply with from there, as llama.cpp chooses it."""
        device = ggml.backend_get_device(ggml.backend)
        for place in ggml.places():
            context = _Context(ggml)
            tensor = context.tensor(type_, *sizes)
            context.place(place)
            x, ids = context.tensor(_F32, sizes[0], 1, 1), context.tensor(_I32, 1, 1)
            product = ggml.mul_mat_id(context.pointer, tensor, x, ids)
            if place == ggml.plain or ggml.backend_dev_supports_op(device, product):
                break
        self.contexts.append(context)
        context.fill(tensor, values)
        return tensor


class _Graph:
    """The layer for a number of tokens."""

    def __init__(self, ggml: _Ggml, layer: Layer, weights: _Weights, num_tokens: int) -> None:
        self.context = _Context(ggml)
        pointer, s = self.context.pointer, layer.shape
        self.inputs = x, ids, scales = (
            self.context.tensor(_F32, s.hidden_size, 1, num_tokens),
            self.context.tensor(_I32, s.top_k, num_tokens),
            self.context.tensor(_F32, 1, s.top_k, num_tokens),
        )
        for tensor in self.inputs:
            ggml.set_input(tensor)

        def linear(which: int, rows: int) -> int:
            out: int = ggml.mul_mat_id(pointer, weights.matrices[which], rows, ids)
            if weights.biases:
                out = ggml.add_id(pointer, out, weights.biases[which], ids)
            return out

        up, gate = linear(1, x), linear(0, x)
        if s.activation == "swigluoai":
            h = ggml.swiglu_oai(pointer, gate, up, SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT)
        else:
            h = ggml.swiglu_split(pointer, gate, up)
        slots = ggml.mul(pointer, linear(2, h), scales)
        row = s.hidden_size * 4
        parts = [
            ggml.view_2d(pointer, slots, s.hidden_size, num_tokens, s.top_k * row, k * row)
            for k in range(s.top_k)
        ]
        self.graph = ggml.new_graph(pointer)
        for part in parts:  # views before sums, as llama.cpp: sums may then be in place
            ggml.build_forward_expand(self.graph, part)
        self.out = parts[0]
        for part in parts[1:]:
            self.out = ggml.add(pointer, self.out, part)
        ggml.set_output(self.out)
        ggml.build_forward_expand(self.graph, self.out)
        allocator = ggml.gallocr_new(ggml.plain)
        weakref.finalize(self, ggml.gallocr_free, allocator)
        if not ggml.gallocr_alloc_graph(allocator, self.graph):
            raise MemoryError("ggml found no memory")


def _rows(ggml: _Ggml, type_: int, weight: Tensor) -> Parts:
    """Bytes [rows, bytes of a row]."""
    values = weight.float().contiguous()
    out = torch.empty(len(values), ggml.row_size(type_, values.shape[1]), dtype=torch.uint8)
    ggml.quantize_chunk(type_, values.data_ptr(), out.data_ptr(), 0, *values.shape, None)
    return (out,)


def _make(types: dict[str, int], layer: Layer, base: str, threads: int) -> Run:
    ggml = _load()
    weights = _Weights(ggml, layer, types[base])

    @cache
    def graph(num_tokens: int) -> _Graph:
        return _Graph(ggml, layer, weights, num_tokens)

    def run(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        one = graph(hidden_states.shape[0])
        values = (hidden_states.float(), topk_ids.int(), topk_weights.float())
        for tensor, value in zip(one.inputs, values, strict=True):
            one.context.fill(tensor, value)
        ggml.backend_cpu_set_n_threads(ggml.backend, threads)
        if ggml.backend_graph_compute(ggml.backend, one.graph) != _SUCCESS:
            raise RuntimeError("ggml could not compute the layer")
        out = torch.empty(hidden_states.shape, dtype=torch.float32)
        ggml.backend_tensor_get(one.out, out.data_ptr(), 0, out.numel() * 4)
        return out.to(hidden_states.dtype)

    return run


def _peer(name: str, about: str, types: dict[str, int]) -> Peer:
    return Peer(
        name=name,
        about=about,
        beside={base: base for base in types},
        make=partial(_make, types),
        # its copy, and ours to make it from
        bytes_per_weight={"bf16": 4, "int8": 2.2, "int4": 1.2, "mxfp4": 1.1},
        absent=_absent,
        activations=("silu", "swigluoai"),
    )


PEERS: tuple[Peer, ...] = (
    _peer(
        "llama_cpp",
        "llama.cpp's mul_mat_id; its types BF16, Q8_0, Q4_0, MXFP4",
        {"bf16": _BF16, "int8": _Q8_0, "int4": _Q4_0, "mxfp4": _MXFP4},
    ),
    _peer("llama_cpp_q4_k", "the same with type Q4_K", {"int4": _Q4_K}),
)
