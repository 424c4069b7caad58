"""Round the weights of a model that is a tree of Linear layers, such as a text encoder, one layer after another.

Weights alone are rounded, against the inputs that calibration gives them in the full-precision model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant_core.diffusion.conditioning import seed_stream
from quant_core.diffusion.encoder_calls import Call
from quant_core.fit.hessian import SecondMoment, input_rows
from quant_core.fit.layer_rounding import input_moments, round_layer
from quant_core.nn.layers import QuantLayer, replace_module
from quant_core.nn.steps import StepClock
from quant_spec.enums import RoundingMethod
from quant_spec.errors import QuantizationError
from quant_spec.formats import LayerSpec, WeightSpec
from quant_spec.passes.round import RoundFit
from quant_spec.ranges import RangeSpec


@dataclass(frozen=True, slots=True)
class LinearTree:
    """What is done to each Linear layer: the format of its weight, how its range is found, how it is rounded.

    `cache_bytes`: of second moments that are held at once, where there is more than one layer's.
    """

    weight: WeightSpec
    ranges: RangeSpec
    rounding: RoundFit
    seed: int = 0
    cache_bytes: int = 2 << 30


def round_linear_tree(model: nn.Module, calls: Sequence[Call], config: LinearTree) -> dict[str, float]:
    """Replace all Linear layers of a model, in place, by rounded ones.

    Second moments of inputs are taken of as many layers in one pass over the calibration set as fit in `cache_bytes`,
    always in the full-precision model.

    Parameters
    ----------
    model : nn.Module
        In full precision, in eval mode.
    calls : sequence of Call
        The calibration set; not looked at where weights are rounded to nearest.

    Returns
    -------
    dict of str to float
        Signal-to-noise ratio in dB that rounding leaves at each layer's output, or of its weight if rounded to nearest.

    Raises
    ------
    QuantizationError
        If the model has no Linear layer, or one sees no input.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not layers:
        raise QuantizationError(f"linear layers: got none in {type(model).__name__}, wanted at least one")
    closed = config.rounding.method is RoundingMethod.CLOSED_FORM
    sqnr, rounded = {}, {}
    for group in _groups(layers, config.cache_bytes) if closed else [list(layers)]:
        moments = _second_moments(model, calls, {name: layers[name] for name in group}, config) if closed else {}
        for name in group:
            rounded[name] = QuantLayer(layers[name], LayerSpec(config.weight), StepClock(()))
            seen = input_moments(rounded[name], moments.get(name), config.rounding)
            weight = layers[name].weight.detach()
            sqnr[name] = round_layer(rounded[name], weight, seen, config.ranges, config.rounding.damping).sqnr_db
    for name, layer in rounded.items():
        replace_module(model, name, layer)
    return sqnr


def _groups(layers: Mapping[str, nn.Linear], budget: int) -> Iterator[list[str]]:
    """Split layers into runs whose second moments fit in the budget, of at least one layer each."""
    group: list[str] = []
    held = 0
    for name, layer in layers.items():
        needed = 4 * layer.in_features**2
        if group and held + needed > budget:
            yield group
            group, held = [], 0
        group.append(name)
        held += needed
    yield group


@torch.no_grad()
def _second_moments(
    model: nn.Module,
    calls: Sequence[Call],
    layers: Mapping[str, nn.Linear],
    config: LinearTree,
) -> dict[str, SecondMoment]:
    """Return E[x x^T] of the layers' inputs."""
    found: dict[str, SecondMoment] = {}
    generators = {name: seed_stream(config.seed, f"rows of {name}") for name in layers}

    def watch(name: str) -> Callable[[nn.Module, Sequence[Tensor]], None]:
        def hook(layer: nn.Module, args: Sequence[Tensor]) -> None:
            rows = input_rows(layer, args[0], config.rounding.positions, generators[name])
            found.setdefault(name, SecondMoment(rows.shape[1], rows.device)).update(rows)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(name)).remove)
        for call in calls:
            call(model)
    if unseen := sorted(layers.keys() - found.keys()):
        raise QuantizationError(f"layer {unseen[0]}: got no input from the calibration set, wanted a layer that runs")
    return found
