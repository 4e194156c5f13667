# SPDX-License-Identifier: Apache-2.0
"""Every error that Expertyard raises on purpose.

A message says what, where, expected, got, and what to do. Each class is also a ValueError or a
RuntimeError, so that a caller who knows nothing of Expertyard catches it as usual.
"""

__all__ = [
    "ConfigError",
    "DeviceError",
    "ExpertyardError",
    "KernelError",
    "LoadError",
    "PlanError",
    "RuleError",
    "SpecError",
    "VerifyError",
]


class ExpertyardError(Exception):
    """Base of all errors below."""


class SpecError(ExpertyardError, ValueError):
    """A model description (config.json, safetensors headers, a family name) makes no sense."""


class RuleError(ExpertyardError, ValueError):
    """A placement input (rules file, layer list, ...) is wrong; the message names file and line."""


class PlanError(ExpertyardError, ValueError):
    """Well-formed inputs that cannot be obeyed: contradictions, or memory that does not suffice."""


class ConfigError(ExpertyardError, ValueError):
    """An argument of ExpertsConfig, attach or the command line is wrong."""


class DeviceError(ExpertyardError, RuntimeError):
    """A device that is named is not on this machine, or cannot be used by this build."""


class KernelError(ExpertyardError, ValueError):
    """The op was called with wrong shapes, dtypes, devices or ids, or no kernel serves the call."""


class LoadError(ExpertyardError, ValueError):
    """A checkpoint file or a tensor in it is missing, truncated, corrupt or of the wrong kind."""


class VerifyError(ExpertyardError, RuntimeError):
    """A layer does not run where or how the plan says."""
