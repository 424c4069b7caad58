"""Ways of fitting a denoiser's weights and input grids that `benchmarks.rounding_variants` compares.

Second moments are sums over trajectory steps, each of which may have a weight; input channels may be rotated in groups
before they are quantized. Nothing here is packed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.affine import fake_quantize_affine
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.conditioning import seed_stream
from quant_core.fit.hessian import InputMoments, input_rows
from quant_core.fit.layer_rounding import round_layer
from quant_core.nn.layers import QuantLayer, weight_from_matrix, weight_matrix
from quant_core.nn.model import QuantizedParts, build_quantized
from quant_core.nn.ranges import QParams, qparams_from_range
from quant_spec.enums import ActivationMode
from quant_spec.formats import LayerSpec, ModelFormat
from quant_spec.ranges import RangeSpec

#: Sizes of rotated groups: orders of Hadamard matrices that are powers of the regular one of order 4.
GROUPS = (16, 64, 256)
DAMPING = 0.03
POSITIONS = 32
#: Positions of each sample and step whose rows are kept, to measure a layer's output error on.
_KEPT = 2


def regular_hadamard(order: int) -> Tensor:
    """Return an orthonormal, symmetric Hadamard matrix whose rows all have one sum, shape (order, order), order 4^k.

    The usual (Sylvester) one has a row of ones, which gathers the channels' mean in one channel.
    """
    four = 0.5 - torch.eye(4).flip(1)  # one entry of each row is negative
    made = torch.ones(1, 1)
    while len(made) < order:
        made = torch.kron(made, four)
    if len(made) != order:
        raise ValueError(f"order: got {order}, wanted a power of 4")
    return made


def rotate(x: Tensor, group: int) -> Tensor:
    """Rotate the last dimension of `x` in groups of consecutive elements; a group of 1 leaves it."""
    if group == 1:
        return x
    return (x.unflatten(-1, (-1, group)) @ regular_hadamard(group).to(x)).flatten(-2)


def rotate_channels(x: Tensor, group: int, dim: int) -> Tensor:
    """Rotate the channels of a layer's input, which lie along `dim`: 1 or -1."""
    if group == 1 or dim == -1:
        return rotate(x, group)
    grouped = x.reshape(len(x), x.shape[1] // group, group, -1)
    return (regular_hadamard(group).to(x) @ grouped).reshape(x.shape)


def group_of(spec: LayerSpec, channels: int, wanted: int) -> int:
    """Return the greatest group up to `wanted` that divides each part of a layer's input; 1 if there is none."""
    parts = spec.split or (channels,)
    return max((size for size in GROUPS if size <= wanted and not any(part % size for part in parts)), default=1)


def channel_dim(layer: nn.Module) -> int:
    """Return where the channels of a layer's input lie."""
    return -1 if isinstance(layer, nn.Linear) else 1


@dataclass(slots=True)
class Seen:
    """What was seen of one layer's input.

    `moments`: by weighting, shape (K, K), of mean diagonal 1. `low`, `high`: by rotated group, a tensor (n, parts) for
    each step. `rows`: some of each step, with the step and the sample that each is of.
    """

    moments: dict[str, Tensor] = field(default_factory=dict)
    low: dict[int, list[Tensor]] = field(default_factory=dict)
    high: dict[int, list[Tensor]] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)

    def widen(self, group: int, step: int, low: Tensor, high: Tensor) -> None:
        """Take the extremes of each sample and part, shape (n, parts); a layer may run twice in a forward."""
        lows, highs = self.low.setdefault(group, []), self.high.setdefault(group, [])
        if len(lows) > step:
            lows[step], highs[step] = torch.minimum(lows[step], low), torch.maximum(highs[step], high)
            return
        lows.append(low)
        highs.append(high)


#: What a step's second moment is multiplied with, given the step and the trace of the moment.
Weighting = Callable[[int, float], float]


def see(
    model: nn.Module,
    calibration: CalibrationSet,
    layers: Mapping[str, LayerSpec],
    positions: Sequence[int],
    weightings: Mapping[str, Weighting],
    *,
    groups: Sequence[int] = (),
) -> dict[str, Seen]:
    """Run the full-precision model once over the calibration set, a batch for each step.

    Parameters
    ----------
    positions : sequence of int, length S
        Output positions of each sample that second moments of a step are taken over.
    groups : sequence of int
        Rotations whose ranges are taken, and rows are kept; without any, only moments are.
    """
    found = {name: Seen() for name in layers}
    at = [0]
    handles = []

    def hook(name: str) -> Callable[..., None]:
        seen, spec, drawn = found[name], layers[name], seed_stream(0, name)

        def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, step, dim = args[0], at[0], channel_dim(layer)
            rows = input_rows(layer, x, positions[step], drawn)
            moment = rows.T @ rows / len(rows)
            trace = float(moment.trace())
            for way, weigh in weightings.items():
                seen.moments.setdefault(way, torch.zeros_like(moment)).add_(moment, alpha=weigh(step, trace))
            for group in sorted({group_of(spec, x.shape[dim], group) for group in groups}):
                parts = rotate_channels(x, group, dim).split(spec.split or (x.shape[dim],), dim)
                low, high = zip(*(part.flatten(1).aminmax(dim=1) for part in parts), strict=True)
                seen.widen(group, step, torch.stack(low, 1), torch.stack(high, 1))
            if groups:
                kept = input_rows(layer, x, _KEPT, drawn)
                seen.rows.append(kept)
                seen.steps.append(torch.full((len(kept),), step))
                seen.samples.append(torch.arange(len(x)).repeat_interleave(len(kept) // len(x)))

        return look

    for name in layers:
        handles.append(model.get_submodule(name).register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        for batch in calibration.by_step(calibration.samples):
            at[0] = int(batch.step[0])
            replay(model, batch)
    for handle in handles:
        handle.remove()
    for seen in found.values():
        for moment in seen.moments.values():
            moment /= moment.diagonal().mean().clamp(min=1e-30)
    return found


@dataclass(frozen=True, slots=True)
class Fit:
    """A layer as it will run: the weight that its codes stand for, the grids of its input's parts, its rotation."""

    weight: Tensor
    grids: tuple[QParams, ...]
    group: int = 1


def input_grids(spec: LayerSpec, seen: Seen, group: int) -> tuple[QParams, ...]:
    """Return per-step min-max grids, shape (S,), for each part of an input; none where its grids are dynamic."""
    activation = spec.activation
    if activation is None or activation.mode is not ActivationMode.PER_STEP:
        return ()
    low = torch.stack([step.amin(0) for step in seen.low[group]])
    high = torch.stack([step.amax(0) for step in seen.high[group]])
    return tuple(
        qparams_from_range(low[:, part], high[:, part], activation.bits, symmetric=activation.symmetric)
        for part in range(low.shape[1])
    )


def fit_layer(layer: QuantLayer, weight: Tensor, moment: Tensor, seen: Seen, ranges: RangeSpec, group: int = 1) -> Fit:
    """Round one layer in closed form for its (rotated) input; `weight` and `moment` are of the unrotated."""
    turned = rotate(weight_matrix(weight.detach()), group)
    second = rotate(rotate(moment, group).T, group)
    round_layer(layer, weight_from_matrix(turned, layer.shape), InputMoments(second), ranges, DAMPING)
    return Fit(layer.weight.clone(), input_grids(layer.spec, seen, group), group)


def output_error(layer: QuantLayer, weight: Tensor, fit: Fit, seen: Seen) -> float:
    """Return the mean square error that a fit leaves at a layer's output, on the rows that were kept."""
    rows = torch.cat(seen.rows)
    turned = rotate(rows, fit.group)
    expected = rows @ weight_matrix(weight.detach()).T
    error = _quantized_rows(layer, turned, fit, seen) @ weight_matrix(fit.weight).T - expected
    return float(error.square().mean())


def _quantized_rows(layer: QuantLayer, rows: Tensor, fit: Fit, seen: Seen) -> Tensor:
    """Quantize rows of a layer's input as the layer does where they come from."""
    activation = layer.spec.activation
    if activation is None:
        return rows
    sizes = layer.spec.split or (layer.shape[1],)
    part_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).repeat(rows.shape[1] // sum(sizes))
    steps, samples = torch.cat(seen.steps), torch.cat(seen.samples)
    result = rows.clone()
    for part in range(len(sizes)):
        own = rows[:, part_of == part]
        if fit.grids:
            grid = QParams(fit.grids[part].scale[steps], fit.grids[part].zero_point[steps])
        else:
            if layer.kind is nn.Linear and activation.mode is ActivationMode.DYNAMIC_TOKEN:
                low, high = own.amin(1), own.amax(1)
            else:
                low, high = (torch.stack(side[fit.group])[steps, samples, part] for side in (seen.low, seen.high))
            grid = qparams_from_range(low, high, activation.bits, symmetric=activation.symmetric)
        top = 2**activation.bits - 1
        result[:, part_of == part] = fake_quantize_affine(own, grid.scale[:, None], grid.zero_point[:, None], 0, top)
    return result


def assemble(model: nn.Module, formats: ModelFormat, fits: Mapping[str, Fit]) -> nn.Module:
    """Return a copy of a model in which its layers run as fitted, simulated in float32."""
    made = copy.deepcopy(model)
    parts = build_quantized(made, formats)
    for name, fit in fits.items():
        set_fit(parts.layers[name], fit)
    return made


def set_fit(layer: QuantLayer, fit: Fit) -> None:
    """Let a layer run as fitted."""
    layer.soft_weight = fit.weight
    for quantizer, grid in zip(layer.act_quantizers, fit.grids, strict=bool(fit.grids)):
        quantizer.set_qparams(grid)  # type: ignore[operator]
    if fit.group > 1:
        dim = -1 if layer.kind is nn.Linear else 1
        layer.register_forward_pre_hook(lambda _, args: (rotate_channels(args[0], fit.group, dim),))


def rotated_fits(
    parts: QuantizedParts,
    model: nn.Module,
    seen: Mapping[str, Seen],
    ranges: Mapping[str, RangeSpec],
    moments: str,
) -> dict[str, dict[int, tuple[Fit, float]]]:
    """Return, for each layer and rotation that divides its channels, its fit and the error at its output."""
    found: dict[str, dict[int, tuple[Fit, float]]] = {}
    for name, layer in parts.layers.items():
        weight = model.get_submodule(name).get_parameter("weight")
        for group in sorted({group_of(layer.spec, layer.shape[1], wanted) for wanted in (1, *GROUPS)}):
            fit = fit_layer(layer, weight, seen[name].moments[moments], seen[name], ranges[name], group)
            found.setdefault(name, {})[group] = fit, output_error(layer, weight, fit, seen[name])
    return found
