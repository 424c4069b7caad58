"""Errors of the science.

QuantServiceError
└── QuantCoreError
    ├── UnknownTimestepError    a per-step model was called at a timestep that it was not calibrated for
    ├── TrajectoryError         a model in differences between steps was called out of their order
    ├── ConditioningError       the denoiser wants conditioning that was not given
    ├── DenoiserError           a model folder that cannot be loaded or called
    ├── NotFiniteError          NaN or infinity on a trajectory
    └── ArtifactError           a packed folder that is damaged or not ours
"""

from __future__ import annotations

from quant_spec.errors import InvalidInputError, QuantServiceError


class QuantCoreError(QuantServiceError):
    """Base of this package's errors."""


class UnknownTimestepError(QuantCoreError, InvalidInputError):
    """A per-step model was called at a timestep that it was not calibrated for."""

    exit_code = 2


class TrajectoryError(QuantCoreError, InvalidInputError):
    """A model in differences between steps was called out of their order, or with another batch."""

    exit_code = 2


class ConditioningError(QuantCoreError, InvalidInputError):
    """The denoiser wants conditioning that was not given."""

    exit_code = 2


class DenoiserError(QuantCoreError, InvalidInputError):
    """A model folder that cannot be loaded or called."""

    exit_code = 2


class NotFiniteError(QuantCoreError, InvalidInputError):
    """NaN or infinity on a trajectory: the scheduler's doing or the model's, as the message says."""

    exit_code = 2


class ArtifactError(QuantCoreError, InvalidInputError):
    """A packed folder that is damaged or not ours."""

    exit_code = 2
