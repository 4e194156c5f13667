# SPDX-License-Identifier: Apache-2.0
"""Plans: a model, a request and memory sizes in; where everything lives, and why, out. Pure, no
torch.
"""

from expertyard.plan.make import make_plan
from expertyard.plan.model import SCHEMA, DeviceUse, ExpertGroup, LayerPlan, Plan
from expertyard.plan.request import Request
from expertyard.rules.pins import Finding

__all__ = [
    "SCHEMA",
    "DeviceUse",
    "ExpertGroup",
    "Finding",
    "LayerPlan",
    "Plan",
    "Request",
    "make_plan",
]
