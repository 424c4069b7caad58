"""A denoiser whose weights no single GPU holds, spread over several: whole blocks on each, activations carried between.

The results are those of one device: each block computes where it lies, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import dispatch_model, infer_auto_device_map
from torch import nn

from quant_spec.errors import QuantizationError


def spread(model: nn.Module, devices: Sequence[str]) -> nn.Module:
    """Put the parts of a model on several devices, about as many bytes on each.

    Parameters
    ----------
    model : nn.Module
        On the CPU. Modules of the classes in its `_no_split_modules` stay whole; else every child that has weights of
        its own may lie elsewhere.
    devices : sequence of str
        Torch's names of them; inputs go to the first, and outputs come from it.

    Returns
    -------
    nn.Module
        The same object; it must not be moved any more.

    Raises
    ------
    QuantizationError
        If no split over so many devices holds every part.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    whole = list(getattr(model, "_no_split_modules", None) or ())
    # Whole blocks leave some room on each device; the bound grows until all of it fits on these.
    for room in (1.1, 1.3, 1.6, 2.0):
        bounds: dict[int | str, int | str] = {number: int(size / len(devices) * room) for number in range(len(devices))}
        bounds |= {"cpu": 0, "disk": 0}
        found = infer_auto_device_map(model, max_memory=bounds, no_split_module_classes=whole)
        if set(found.values()) <= set(range(len(devices))):
            placed = {name: devices[int(number)] for name, number in found.items()}
            return dispatch_model(model, placed, main_device=devices[0], force_hooks=True)
    raise QuantizationError(f"model: got parts that cannot be spread over {len(devices)} devices, wanted smaller ones")
