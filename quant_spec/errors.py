"""The roots of every error that Quantmill raises on purpose.

QuantServiceError
├── InvalidInputError                     what the caller gave cannot be used; nothing was changed (exit code 2)
│   └── QuantizationError                 a choice of bits, granularity, range or sampler that cannot be applied
├── kernels.errors.KernelError            a low-bit primitive was called with what it cannot do
├── quant_core.errors.QuantCoreError      the science: models, conditioning, artifacts
├── workers.errors.WorkerError            stores, caches, task bodies
└── orchestrator.errors.OrchestratorError recipes, queue, registry, command line

An error's message says what, got and wanted, in one line. `exit_code` is what the command line returns for it.
"""

from __future__ import annotations


class QuantServiceError(Exception):
    """Base of Quantmill's errors; `exit_code` 1 means our fault."""

    exit_code: int = 1


class InvalidInputError(QuantServiceError, ValueError):
    """What the caller gave cannot be used; nothing was changed."""

    exit_code = 2


class QuantizationError(InvalidInputError):
    """A choice of bits, granularity, range or sampler that cannot be applied."""
