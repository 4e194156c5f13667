# SPDX-License-Identifier: Apache-2.0
"""The layer that makes CPU and GPUs one machine: a plan is obeyed, and all devices work at once."""

from .build import build
from .copies import bring, spread
from .crossover import choose, measure, measure_new
from .explain import explain
from .layer import LayerExperts, Part
from .options import RunOptions
from .parallel import join
from .placement import PartPlan, Placement, Prefill, check_devices, place_experts, split_rank
from .policies import make_policy
from .routing import RoutingRecord
from .trace import Tracer, tracing

__all__ = [
    "LayerExperts",
    "Part",
    "PartPlan",
    "Placement",
    "Prefill",
    "RoutingRecord",
    "RunOptions",
    "Tracer",
    "bring",
    "build",
    "check_devices",
    "choose",
    "explain",
    "join",
    "make_policy",
    "measure",
    "measure_new",
    "place_experts",
    "split_rank",
    "spread",
    "tracing",
]
