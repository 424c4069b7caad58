"""Find the units of any diffusers denoiser: the blocks that are reconstructed as a whole.

The rule looks at structure only. A ModuleList or Sequential with an item that holds at least two quantizable layers is
a *stack of blocks*. A module that holds at least two quantizable layers and has no stack inside is a unit
(ResnetBlock, attention, transformer block, timestep MLP); a layer outside of any is a unit of its own (conv_in,
downsamplers, proj_out). So a residual block or a transformer block stays whole, whatever it is called, and a stage
that strings such blocks together is taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from quant_core.errors import DenoiserError
from quant_core.inspect.trace import Trace, is_attention
from quant_core.nn.layers import QUANTIZABLE

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Unit:
    """A module that is reconstructed as a whole; names are dotted paths in the denoiser.

    `layers` and `attentions` (modules with a processor, the unit itself included) are in the order in which they run.
    """

    name: str
    layers: tuple[str, ...]
    attentions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Units:
    """All units in the order in which they run, and the layers that a forward never calls."""

    units: tuple[Unit, ...]
    unused: tuple[str, ...]


def quantizable_layers(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the Conv and Linear layers at or below a module, by name."""
    return {name: child for name, child in module.named_modules(prefix=prefix) if isinstance(child, QUANTIZABLE)}


def find_units(model: nn.Module, trace: Trace) -> Units:
    """Return the units of a denoiser.

    Parameters
    ----------
    trace : Trace
        One forward of the same model: gives the order and what is unused.

    Raises
    ------
    DenoiserError
        If no quantizable layer runs.
    """
    order = {name: place for place, name in enumerate(trace.layers)}
    calls = {event.name: place for place, event in reversed(list(enumerate(trace.events)))}
    units, unused = [], []
    for name in unit_names(model):
        module = model.get_submodule(name)
        layers = quantizable_layers(module, name)
        used = sorted((layer for layer in layers if layer in order), key=order.__getitem__)
        unused += [layer for layer in layers if layer not in order]
        attentions = (
            path
            for path, child in module.named_modules(prefix=name)
            if is_attention(child) and path in trace.attentions
        )
        if used:
            units.append(Unit(name, tuple(used), tuple(sorted(attentions, key=calls.__getitem__))))
    if not units:
        raise DenoiserError(f"{type(model).__name__}: got no Conv or Linear layer that runs, wanted at least one")
    return Units(tuple(sorted(units, key=lambda unit: order[unit.layers[0]])), tuple(unused))


def unit_names(model: nn.Module) -> list[str]:
    """Return the names of the units in the order of definition; each quantizable layer lies under exactly one."""
    name, root = _descend("", model)
    return list(_walk(name, root, is_root=True))


def _descend(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """Go down while all quantizable layers lie in one child: a wrapper is as much the root as what it wraps."""
    while True:
        holders = [(n, child) for n, child in module.named_children() if quantizable_layers(child)]
        if len(holders) != 1 or isinstance(module, QUANTIZABLE):
            return name, module
        child_name, child = holders[0]
        if isinstance(child, QUANTIZABLE):
            return name, module
        name, module = _join(name, child_name), child


def _walk(name: str, module: nn.Module, *, is_root: bool = False) -> Iterator[str]:
    layers = quantizable_layers(module)
    if not layers:
        return
    is_block = not is_root and not isinstance(module, _CONTAINERS) and len(layers) >= 2 and not _has_stack(module)
    if is_block or isinstance(module, QUANTIZABLE):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _walk(_join(name, child_name), child)


def _has_stack(module: nn.Module) -> bool:
    """Whether a container inside holds an item with two or more quantizable layers."""
    containers = (child for child in module.modules() if child is not module and isinstance(child, _CONTAINERS))
    return any(
        not isinstance(item, _CONTAINERS) and len(quantizable_layers(item)) >= 2
        for container in containers
        for item in container.children()
    )


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
