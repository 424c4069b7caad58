"""Find the grids of differences between steps, in closed loop (MoDiff, Gao et al., arXiv:2506.22463).

    d_t = a_t - A_{t+1},     A_t = A_{t+1} + Q_t(d_t),     y_t = y_{t+1} + W Q_t(d_t)

The quantized model runs along recorded full-precision trajectories, step after step, all samples in one batch. When a
layer is called at a step, it takes the grid of that step from the difference that it is about to quantize; so each
range is that of what earlier steps left over and of what quantized layers before it give, as at run time. What runs is
the layer's own forward (`quant_core.nn.differences`).

Where we differ: the authors take ranges of differences at run time; here a step has a grid of its own, as other
activations have, so that integer kernels serve. Plain steps have the grids that they had. A step stays plain where a
difference does not pay, and a layer where its state would exceed a budget.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kernels.affine import fake_quantize_affine
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.conditioning import seed_stream
from quant_core.fit.step_gains import StepGains
from quant_core.fit.unit_state import UnitState, collect_state, load_states, merge_formats
from quant_core.methods.modiff.step_widths import PLAIN, Rounding, choose_step_widths
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QuantLayer
from quant_core.nn.model import QuantizedParts, build_quantized
from quant_core.nn.ranges import QParams, qparams_from_range
from quant_spec.enums import RangeMethod
from quant_spec.errors import QuantizationError
from quant_spec.formats import LayerSpec
from quant_spec.tasks.differences import Params

#: Values of a difference that its range is found from, besides its extremes.
DRAWN_VALUES = 4096
#: Shares of a min-max range that are tried.
SHRUNKEN = torch.linspace(1.0, 0.1, 37)
#: Rows whose inputs are compared from step to step, to see how much they move.
WATCHED = 2
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DifferenceStates:
    """What was found.

    Attributes
    ----------
    states : list of UnitState
        As given, with layers in differences.
    state_bytes : int
        What layers remember of one sample between steps.
    layers : int
        Those in differences at some step.
    steps : float
        Mean over these layers of the steps at which they are.
    """

    states: list[UnitState]
    state_bytes: int
    layers: int
    steps: float


@torch.no_grad()
def fit_differences(
    model: nn.Module,
    calibration: CalibrationSet,
    states: Sequence[UnitState],
    params: Params,
    gains: StepGains | None = None,
) -> DifferenceStates:
    """Let layers of a quantized model read differences.

    Parameters
    ----------
    model : Module
        The full-precision denoiser; its layers are replaced in place.
    calibration : CalibrationSet
        Every step of the sampler's trajectory.
    states : sequence of UnitState
        Of all quantized units, their activations per step.
    gains : StepGains, optional
        What an error of the prediction at each step does to the final sample; needed if bits of a layer's steps are
        chosen by it (`params.by_effect`).

    Raises
    ------
    QuantizationError
        If the sampler calls the denoiser twice at its first timestep, or a layer's input is not per step.
    """
    timesteps = calibration.timesteps
    if len(timesteps) > 1 and bool(timesteps[0] == timesteps[1]):
        raise QuantizationError(
            f"differences: got two calls at the first timestep {float(timesteps[0]):g}, wanted a sampler that calls "
            "its denoiser once there"
        )
    widths: dict[str, tuple[int, ...]] | None = None
    if params.by_effect:
        if gains is None:
            raise QuantizationError("differences: got no gains of steps, wanted them, as bits are chosen by effect")
        exact = copy.deepcopy(model)
        _, tried = _close_loops(copy.deepcopy(model), calibration, states, params)
        widths = choose_step_widths(exact, calibration, [loop.rounding() for loop in tried.values()], gains, params)
    parts, loops = _close_loops(model, calibration, states, params, widths)
    return _result(parts, states, loops, min(params.samples, calibration.samples))


def _close_loops(
    model: nn.Module,
    calibration: CalibrationSet,
    states: Sequence[UnitState],
    params: Params,
    widths: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[QuantizedParts, dict[str, _Loop]]:
    """Quantize a model, and run it along the trajectories with each layer taking its grids.

    Bits of each step of layers, where they are given: 0 is a plain step. A layer without them is plain.
    """
    parts = build_quantized(model, merge_formats(list(states)))
    load_states(model, list(states))
    # What `exceptions` left in full precision has no differences.
    quantized = {n: layer for n, layer in parts.layers.items() if layer.spec.activation is not None}
    names = [name for name in params.layers if name in quantized]
    alike = params.widths(calibration.steps)
    plain = (PLAIN,) * calibration.steps
    loops = {
        n: _Loop(quantized[n], n, params, alike if widths is None else widths.get(n, plain), widths is not None)
        for n in names
    }
    parts.clock.follows = True
    rows = min(params.samples, calibration.samples)
    with ExitStack() as stack:
        for loop in loops.values():
            stack.callback(loop.layer.register_forward_pre_hook(loop.before).remove)
            stack.callback(loop.layer.register_forward_hook(loop.after).remove)
        for step in range(calibration.steps):
            replay(model, calibration.rows(step, 0, rows))
            if step == 0 and widths is None:
                _keep_within(list(loops.values()), rows, params.state_mib * MIB)
    return parts, loops


@dataclass(slots=True)
class _Loop:
    """One layer on its way along the trajectories.

    `widths`: bits of a difference at each step. `is_told`: they were chosen, 0 where the step is plain; otherwise a
    step is plain where a difference does not pay. `plain`, `tried`, `moves`: width of a plain code and of a
    difference's, and how much the input has changed, at each step, for each part.
    """

    layer: QuantLayer
    name: str
    params: Params
    widths: tuple[int, ...]
    is_told: bool
    calls: int = 0
    elements: int = 0
    macs: int = 0
    generator: torch.Generator = field(init=False)
    last: Tensor | None = None
    plain: Tensor = field(init=False)
    moves: Tensor = field(init=False)
    tried: Tensor = field(init=False)

    def __post_init__(self) -> None:
        spec = self.layer.spec.activation
        if spec is None or len(_quantizers(self.layer)[0].scale) != self.steps or spec.step_bits:
            raise QuantizationError(
                f"differences: got layer {self.name} with {'no' if spec is None else spec.mode} ranges, wanted one "
                f"for each of the {self.steps} steps, of one width"
            )
        self.generator = seed_stream(self.params.seed, f"differences of {self.name}")
        self.plain = torch.stack([each.scale.cpu().clone() for each in _quantizers(self.layer)], dim=1)
        self.tried = torch.full((self.steps, len(_quantizers(self.layer))), torch.nan)
        self.moves = torch.full_like(self.tried, torch.nan)
        open_steps = (step for step in range(1, self.steps) if not self.is_told or self.widths[step] != PLAIN)
        self.layer.differences = frozenset(open_steps)
        for quantizer in _quantizers(self.layer):
            quantizer.spec = replace(spec, step_bits=(spec.bits,) * self.steps)
            quantizer.tops = torch.full((self.steps,), 2.0**spec.bits - 1)

    def before(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Choose how the step that is about to run is quantized."""
        clock = self.layer.clock
        step = clock.moment[1]
        self.calls = self.calls + 1 if step == 0 else self.calls
        if self.params.by_effect and not self.is_told:
            self._watch(step, args[0][:WATCHED].float())
        if step not in self.layer.differences:
            return
        held, _ = self.layer.memory.recall(clock, args[0].float(), self.name)
        if not self._takes(step, args[0].float(), args[0].float() - held):
            self.layer.differences -= {step}

    def _watch(self, step: int, x: Tensor) -> None:
        """Note how much the input has changed since the step before."""
        if self.last is not None and step > 0:
            dim = -1 if self.layer.kind is nn.Linear else 1
            parts = (x - self.last).split(self.layer.spec.split or (x.shape[dim],), dim)
            pairs = zip(_quantizers(self.layer), parts, strict=True)
            self.moves[step] = torch.stack([_scaled(part, quantizer).abs().mean() for quantizer, part in pairs]).cpu()
        self.last = x if step < self.steps - 1 else None

    def after(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Count what is remembered, and multiplications."""
        self.elements = args[0].numel() + output.numel()
        self.macs = output.numel() * self.layer.columns

    def _takes(self, step: int, x: Tensor, difference: Tensor) -> bool:
        """Set the grids of a difference if it pays; say whether."""
        bits, grids = self.widths[step], []
        noise = torch.zeros(2, dtype=torch.float64, device=x.device)  # of plain codes, of the difference's
        dim = -1 if self.layer.kind is nn.Linear else 1
        sizes = self.layer.spec.split or (x.shape[dim],)
        for quantizer, *pair in zip(
            _quantizers(self.layer), x.split(sizes, dim), difference.split(sizes, dim), strict=True
        ):
            rows = self._draw(torch.stack([_scaled(values, quantizer).flatten() for values in pair]))
            grid, errors = _choose_grids(rows, bits, quantizer.spec.symmetric, self.params.range)
            noise += errors * pair[0].numel()
            grids.append(QParams(grid.scale[1], grid.zero_point[1]))
        self.tried[step] = torch.stack([grid.scale for grid in grids]).cpu()
        plain, changed = noise.tolist()
        if not self.is_told and changed > 0 and plain < changed * 10 ** (self.params.least_gain_db / 10):
            return False
        for quantizer, grid in zip(_quantizers(self.layer), grids, strict=True):
            _set_step(quantizer, step, grid, bits)
        return True

    def _draw(self, rows: Tensor) -> Tensor:
        """Return some columns of rows (2, n), and the extremes of each row."""
        ends = torch.stack(torch.aminmax(rows, dim=1), dim=1)
        count = rows.shape[1]
        if count > DRAWN_VALUES:
            rows = rows[:, torch.randint(count, (DRAWN_VALUES,), generator=self.generator).to(rows.device)]
        return torch.cat([rows, ends], dim=1)

    def rounding(self) -> Rounding:
        """Return how the layer rounds with the same bits everywhere."""
        spec = self.layer.spec.activation
        assert spec is not None
        widths = tuple(bits if step in self.layer.differences else PLAIN for step, bits in enumerate(self.widths))
        return Rounding(
            self.name, self.layer, self.macs, spec.bits, widths, self.plain, self.tried, self.widths, self.moves
        )

    @property
    def steps(self) -> int:
        """Steps of the trajectory."""
        return len(self.widths)

    def leave_plain(self) -> None:
        """Take no differences at all."""
        self.layer.differences = frozenset()
        self.layer.memory.held = self.layer.memory.output = None


def _keep_within(loops: Sequence[_Loop], rows: int, budget: float) -> None:
    """Leave layers plain that run more than once in a call, and those whose state exceeds the budget in bytes."""
    left = budget
    for loop in sorted(loops, key=lambda loop: (-loop.macs / max(loop.elements, 1), loop.name)):
        needed = 4 * loop.elements / rows
        if loop.calls != 1 or needed > left:
            loop.leave_plain()
        else:
            left -= needed


def _choose_grids(rows: Tensor, bits: int, symmetric: bool, method: RangeMethod) -> tuple[QParams, Tensor]:
    """Return the grid of each of rows (R, n), and its mean square error, shape (R,), dtype float64.

    For mse, that of the least error among shrunken min-max ranges: fewer than `choose_qparams` tries, and all at once,
    since each layer chooses at each step.
    """
    shrink = SHRUNKEN.to(rows.device) if method is RangeMethod.MSE else torch.ones(1, device=rows.device)
    low, high = rows.amin(1) * shrink[:, None], rows.amax(1) * shrink[:, None]  # (candidates, R)
    grids = qparams_from_range(low, high, bits, symmetric=symmetric)
    found = fake_quantize_affine(
        rows.expand(len(shrink), *rows.shape), grids.scale[..., None], grids.zero_point[..., None], 0, 2**bits - 1
    )
    errors = (found - rows).square_().mean(2)
    best = errors.argmin(0, keepdim=True)
    scale, zero_point = (table.gather(0, best)[0] for table in (grids.scale, grids.zero_point))
    return QParams(scale, zero_point), errors.gather(0, best)[0].double()


def _scaled(values: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """Return values as the quantizer sees them: divided by its channels' scales."""
    channels = quantizer.channels
    if channels is None or not channels.scaled:
        return values
    return values / channels.shape(values, quantizer.channel_scale)


def _set_step(quantizer: ActivationQuantizer, step: int, grid: QParams, bits: int) -> None:
    """Set the grid of one step."""
    quantizer.scale[step], quantizer.zero_point[step] = grid.scale, grid.zero_point
    quantizer.tops[step] = 2.0**bits - 1
    if quantizer.channels is not None and quantizer.channels.shifted:
        quantizer.channel_shift[step] = 0


def _result(
    parts: QuantizedParts, states: Sequence[UnitState], loops: Mapping[str, _Loop], rows: int
) -> DifferenceStates:
    """Collect the states in their new formats."""
    taken = {name: loop for name, loop in loops.items() if loop.layer.differences}
    made = []
    for state in states:
        layers = {
            name: _in_differences(spec, taken[name]) if name in taken else spec
            for name, spec in state.formats.layers.items()
        }
        made.append(collect_state(parts, replace(state.formats, layers=layers), state.timesteps))
    held = sum(4 * loop.elements // rows for loop in taken.values())
    steps = sum(len(loop.layer.differences) for loop in taken.values()) / max(len(taken), 1)
    return DifferenceStates(made, held, len(taken), steps)


def _in_differences(spec: LayerSpec, loop: _Loop) -> LayerSpec:
    """Return a layer's format with the steps at which it reads differences."""
    activation = spec.activation
    assert activation is not None
    steps = tuple(sorted(loop.layer.differences))
    widths = tuple(
        loop.widths[step] if step in loop.layer.differences else activation.bits for step in range(loop.steps)
    )
    bits = max(widths)
    return replace(spec, activation=replace(activation, bits=bits, step_bits=widths, differences=steps))


def _quantizers(layer: QuantLayer) -> list[ActivationQuantizer]:
    """Return the quantizers of a layer's input parts."""
    return [each for each in layer.act_quantizers if isinstance(each, ActivationQuantizer)]
