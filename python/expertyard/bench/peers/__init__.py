# SPDX-License-Identifier: Apache-2.0
"""The peers, one a file or a family of them a file; a new one is a Peer and its name here."""

from . import ggml, kt
from .base import TOLERANCE, Peer, Run
from .hugging_face import HF_EAGER, HF_GROUPED_MM
from .torch_packed import INT4PACK, INT8PACK, LINEAR_DYNAMIC, ONEDNN
from .vllm import VLLM

__all__ = ["PEERS", "TOLERANCE", "Peer", "Run"]

PEERS = {
    peer.name: peer
    for peer in (
        HF_EAGER,
        HF_GROUPED_MM,
        ONEDNN,
        LINEAR_DYNAMIC,
        INT8PACK,
        INT4PACK,
        VLLM,
        *kt.PEERS,
        *ggml.PEERS,
    )
}
