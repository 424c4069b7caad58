"""Errors of the kernels."""

from __future__ import annotations

from quant_spec.errors import InvalidInputError


class KernelError(InvalidInputError):
    """A low-bit primitive was called with shapes, bits or values that it does not support."""
