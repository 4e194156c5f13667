# SPDX-License-Identifier: Apache-2.0
# What csrc/bindings.cpp defines. ValueError where a name or a handle is not known.
from collections.abc import Sequence
from typing import Any

build: dict[str, str]

def kernels() -> list[dict[str, Any]]: ...
def cpu_features() -> dict[str, bool]: ...
def thread_limits() -> dict[str, Any]: ...
def cuda_status() -> dict[str, Any]: ...
def cuda_problem(device: int) -> str | None: ...
def kernel_name(
    format: str, hidden_dtype: str, layout: str = "rows", mode: str = "exact"
) -> str: ...
def cuda_kernel_name(handle: int, hidden_dtype: str, num_tokens: int, top_k: int) -> str: ...
def force_isa(isa: str | None) -> None: ...
def forced_isa() -> str | None: ...
def add_experts(
    format: str,
    activation: str,
    alpha: float,
    limit: float,
    hidden_size: int,
    intermediate_size: int,
    gate_up_row_stride: int,
    down_row_stride: int,
    pointers: Sequence[tuple[int, ...]],
    device: int = -1,
    layout: str = "rows",
    mode: str = "exact",
    scale_type: str = "none",
    group_size: int = 0,
    zeros: bool = False,
) -> int: ...
def linear_packing(format: str, scale_type: str, group_size: int, zeros: bool) -> int: ...
def decode_ggml(kind: str, blocks: int, count: int, out: int) -> None: ...
def decode_words(awq: bool, words: int, inputs: int, outputs: int, codes: int) -> None: ...
def blob_bytes(
    format: str,
    scale_type: str,
    group_size: int,
    zeros: bool,
    hidden_size: int,
    intermediate_size: int,
    has_gate: bool,
) -> tuple[int, int]: ...
def pack_blob(
    format: str,
    scale_type: str,
    group_size: int,
    zeros: bool,
    rows: int,
    k: int,
    sources: Sequence[tuple[int, ...]],
    out: int,
) -> None: ...
def quantize_rows(
    format: str,
    scale_type: str,
    group_size: int,
    zeros: bool,
    search: bool,
    rows: int,
    k: int,
    source: tuple[int, str, int],
    to: tuple[int, int, int],
) -> None: ...
def quantize_blob(
    format: str,
    scale_type: str,
    group_size: int,
    zeros: bool,
    search: bool,
    rows: int,
    k: int,
    sources: Sequence[tuple[int, str, int]],
    out: int,
) -> None: ...
def advise_huge_pages(memory: int, bytes: int) -> None: ...
def write_expert(handle: int, expert: int, pointers: tuple[int, ...]) -> None: ...
def limit_caller(threads: int) -> None: ...
def occupy_lane(lane: int, seconds: float) -> None: ...
def add_desk(
    device: int,
    num_tokens: int,
    hidden_size: int,
    top_k: int,
    hidden_dtype: str,
    threads: int,
    timeout: float,
    host_functions: bool,
) -> int: ...
def check_desk(desk: int) -> None: ...
def remove_desk(desk: int) -> None: ...
def add_away(
    home: int,
    there: int,
    num_tokens: int,
    hidden_size: int,
    top_k: int,
    hidden_dtype: str,
    weights_dtype: str,
    ids_are_int64: bool,
) -> int: ...
def remove_away(away: int) -> None: ...
def capture_id(device: int, stream: int) -> int: ...
def last_spans() -> list[tuple[int, int, int]]: ...
def remove_experts(handle: int) -> bool: ...
def check_experts(handle: int) -> None: ...
def experts_info(handle: int) -> dict[str, Any]: ...
def read_gbps(kernel: str, memory: int, bytes: int, threads: int) -> float: ...
def peak_gflops(kernel: str, threads: int) -> float: ...
def dispatch_us(threads: int) -> float: ...
