# SPDX-License-Identifier: Apache-2.0
"""Expertyard in Hugging Face models: three roads in, and verify() to prove where one has arrived.

A. from_pretrained(path, quantization_config=ExpertsConfig(...)): packed and placed while loading.
B. from_pretrained(path, experts_implementation="expertyard"): only the kernels.
C. attach(model) and detach(model): a model in memory, and back again.
"""

try:
    import transformers
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "expertyard.hf needs transformers 5.7 or newer: pip install 'expertyard[hf]'"
    ) from error

from ..registration import register
from .attachment import attach, detach
from .config import ExpertsConfig
from .load import from_pretrained
from .module import ExpertyardExperts
from .quantizer import ExpertyardHfQuantizer
from .running import deferral_error, layers_of, move, recording, set_policy
from .verification import LayerReport, VerifyReport, verify

__all__ = [
    "ExpertsConfig",
    "ExpertyardExperts",
    "ExpertyardHfQuantizer",
    "LayerReport",
    "VerifyReport",
    "attach",
    "deferral_error",
    "detach",
    "from_pretrained",
    "layers_of",
    "move",
    "recording",
    "set_policy",
    "verify",
]

_OLDEST = (5, 7)
if tuple(int(word) for word in transformers.__version__.split(".")[:2]) < _OLDEST:
    raise ImportError(
        f"expertyard.hf needs transformers 5.7 or newer, found {transformers.__version__}: "
        "pip install -U transformers"
    )

register()
