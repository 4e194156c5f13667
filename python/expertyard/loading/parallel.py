# SPDX-License-Identifier: Apache-2.0
"""Runs a function over many small pieces of work on several threads; the first error ends it all.

torch releases the interpreter's lock in its kernels, so threads are enough. Each uses one core:
otherwise every one of them would start a team of its own.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

import torch

__all__ = ["for_each"]

T = TypeVar("T")


def for_each(work: Iterable[T], function: Callable[[T], None], threads: int) -> None:
    """Calls function(item) for every item, at most `threads` at once. Raises what it raises."""
    if threads <= 1:
        for item in work:
            function(item)
        return
    before = torch.get_num_threads()
    items = iter(work)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            # few are handed over at a time, so that after an error nothing is left to run
            running = {pool.submit(function, item) for item in islice(items, 2 * threads)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for each in done:
                    each.result()
                running |= {pool.submit(function, item) for item in islice(items, len(done))}
    finally:
        torch.set_num_threads(before)
