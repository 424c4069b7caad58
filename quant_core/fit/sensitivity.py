"""What each choice for one layer does to the prediction along the trajectory, in context.

A layer alone in an otherwise exact network is not where its error will work: the rest is quantized too. So all other
layers carry a share t of the error that they have at a middle width (their weights are W + t (Q - W)), for a few t
between 0 and 1, and a choice's damage is the mean over these of

    mean over elements of |f(context, layer as chosen) - f(context, layer exact)|^2

weighted over trajectory steps by what it does to the final sample. The final rounding is what is measured: states of a
menu (`quant_core.fit.menu`), the same that are packed.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import Batch, CalibrationSet, replay
from quant_core.fit.exchange import Exchange
from quant_core.fit.step_gains import StepGains
from quant_core.fit.unit_state import UnitState
from quant_core.inspect.prefix import Prefix
from quant_core.nn.steps import StepClock
from quant_spec.enums import UnknownTimestep
from quant_spec.steps import range_of_step

#: Shares of the other layers' errors: the nodes of Gauss-Legendre quadrature on [0, 1], by their number.
PATHS: Mapping[int, tuple[float, ...]] = {0: (0.0,), 1: (0.5,), 2: (0.21132486540518713, 0.7886751345948129)}


@dataclass(frozen=True, slots=True)
class Choices:
    """What can be chosen for a group of units.

    `weights`: states with weights, several for each unit. `activations`: states with activation tables.
    """

    weights: Sequence[UnitState]
    activations: Sequence[UnitState]


@dataclass(slots=True)
class Damage:
    """Damage of (layer or attention, width) in each range of trajectory steps, shape (R,), float64."""

    weights: dict[tuple[str, int], Tensor]
    activations: dict[tuple[str, int], Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """A calibration row that errors are measured on.

    `step`: position among the recorded ones. `weight`: what a mean square error of its prediction counts.
    `span`: the range of trajectory steps that it stands for.
    """

    step: int
    sample: int
    weight: float
    span: int = 0


def choose_rows(gains: StepGains, recorded: Sequence[int], samples: int, rows: int, ranges: int = 1) -> list[Row]:
    """Choose the rows that say most of the final samples' error, and what each counts.

    An error of the prediction does to the sample what the gain of its step says, which falls by orders of magnitude
    along the trajectory; most rows should lie where most of the damage is made. So steps are drawn in proportion to
    what each step of the quantized model that gains were measured with did to the sample (stratified importance
    sampling); a choice's error counts as its share of that model's error at the step. Each range has one row at least.

    Parameters
    ----------
    gains : StepGains
    recorded : sequence of int
        Steps of the trajectory that the calibration set has.
    samples : int
        Its rows of each step.
    rows : int
        Wanted in all.
    ranges : int
        Equal ranges of trajectory steps that are told apart.
    """
    powers, steps = gains.powers, len(gains.powers)
    total = max(sum(powers), 1e-30)
    chosen: list[Row] = []
    for span in range(ranges):
        own = [step for step in range(steps) if range_of_step(step, steps, ranges) == span]
        mass = sum(powers[step] for step in own)
        count = max(1, round(rows * mass / total))
        passed = list(itertools.accumulate(powers[step] for step in own))
        for draw in range(count):
            step = own[min(bisect_left(passed, (draw + 0.5) / count * mass), len(own) - 1)]
            place = min(range(len(recorded)), key=lambda at: abs(recorded[at] - step))
            weight = gains.coherence * mass / count / gains.noises[recorded[place]]
            chosen.append(Row(place, len(chosen) % samples, weight, span))
    return chosen


@torch.no_grad()
def measure(
    model: nn.Module,
    calibration: CalibrationSet,
    units: Sequence[str],
    context: Sequence[UnitState],
    choices: Choices,
    *,
    path: Sequence[float],
    rows: Sequence[Row],
    batch_size: int,
) -> Damage:
    """Measure every choice of a group of units.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser; left as it is.
    units : sequence of str
        All units, in the order in which they run.
    context : sequence of UnitState
        Weights of all units at the middle width.
    path : sequence of float
        Shares of the other layers' errors.
    rows : sequence of Row
        What is measured on; damages are sums over them.
    batch_size : int
        Rows in one forward.
    """
    lab = _Lab(model, calibration, units, context, choices, 1 + max(row.span for row in rows))
    for share in path:
        with lab.in_context(share):
            for first in range(0, len(rows), batch_size):
                part = rows[first : first + batch_size]
                index = torch.tensor([row.step * calibration.samples + row.sample for row in part])
                lab.measure(calibration.gather(index), part, exact_around=share == 0)
    return Damage(
        {key: damage / len(path) for key, damage in lab.weights.items()},
        {key: damage / len(path) for key, damage in lab.activations.items()},
    )


def fitted_to_units(damage: Damage, context: Sequence[UnitState], units: Mapping[str, float]) -> Damage:
    """Scale the damages of each unit's weights so that together, at the middle width, they are what was measured of it.

    Rows of single steps say how the choices within a unit compare. How far its errors add up along the trajectory, they
    don't: deep units' errors, which are smooth, add up most.

    Parameters
    ----------
    context : sequence of UnitState
        Weights of all units at the middle width.
    units : mapping of str to float
        Mean square error of the final samples with one unit at that width (`StepGains.units`).
    """
    weights = dict(damage.weights)
    for state in context:
        middle = [(name, spec.weight.bits) for name, spec in state.formats.layers.items()]
        total = sum(float(damage.weights[key].sum()) for key in middle if key in damage.weights)
        if total > 0 and state.formats.unit in units:
            factor = units[state.formats.unit] / total
            weights |= {key: power * factor for key, power in weights.items() if key[0] in state.formats.layers}
    return Damage(weights, damage.activations)


class _Lab:
    """A model whose layers are changed one at a time."""

    def __init__(
        self,
        model: nn.Module,
        calibration: CalibrationSet,
        units: Sequence[str],
        context: Sequence[UnitState],
        choices: Choices,
        ranges: int,
    ) -> None:
        self.model, self.ranges, self.choices = model, ranges, choices
        self.clock = StepClock([float(t) for t in calibration.timesteps], UnknownTimestep.ERROR)
        self.exchange = Exchange(model, self.clock)
        self.original = {name: self.exchange.held(name) for state in context for name in state.formats.layers}
        self.context = context
        parts = [*choices.weights, *choices.activations]
        inside = {n: s.formats.unit for s in parts for n in (*s.formats.layers, *s.formats.attentions)}
        own = [unit for unit in units if unit in dict(model.named_modules())]
        self.prefix = Prefix(model, own, inside)
        self.weights: dict[tuple[str, int], Tensor] = {}
        self.activations: dict[tuple[str, int], Tensor] = {}

    @contextmanager
    def in_context(self, share: float) -> Iterator[None]:
        """Let all layers carry this share of their error at the middle width."""
        try:
            for state in self.context if share else ():
                for name in state.formats.layers:
                    pairs = zip(self.original[name], self.exchange.rounded(state, name), strict=True)
                    mixed = [torch.lerp(exact, rounded.to(exact), share) for exact, rounded in pairs]
                    self.exchange.hold(name, mixed)
            yield
        finally:
            for name, tensors in self.original.items():
                self.exchange.hold(name, tensors)

    def measure(self, batch: Batch, rows: Sequence[Row], *, exact_around: bool) -> None:
        """Add the damages of all choices on some rows; `exact_around` says that all other layers are exact."""
        self.clock.set_timestep(batch.timestep)
        given = self.prefix.record(lambda: replay(self.model, batch))
        exact: dict[str, Tensor] = {}
        for state in self.choices.weights:
            for name, spec in state.formats.layers.items():
                if name not in exact:
                    exact[name] = given if exact_around else self._with_layer(name, self.original[name], batch)
                made = self._with_layer(name, self.exchange.rounded(state, name), batch)
                self._add(self.weights, (name, spec.weight.bits), made - exact[name], rows)
        done: set[tuple[str, int]] = set()  # the base's width may be on the menu too
        for state in self.choices.activations:
            for name, layer in state.formats.layers.items():
                if layer.activation is not None and (name, layer.activation.bits) not in done:
                    done.add((name, layer.activation.bits))
                    with self.exchange.quantized_input(state, name):
                        made = self._forward(name, batch)
                    self._add(self.activations, (name, layer.activation.bits), made - given, rows)
            for name, attention in state.formats.attentions.items():
                if (name, attention.activation.bits) in done:
                    continue
                done.add((name, attention.activation.bits))
                with self.exchange.quantized_attention(state, name):
                    made = self._forward(name, batch)
                self._add(self.activations, (name, attention.activation.bits), made - given, rows)

    def _forward(self, name: str, batch: Batch) -> Tensor:
        with self.prefix.before(name):
            return replay(self.model, batch)

    def _with_layer(self, name: str, tensors: Sequence[Tensor], batch: Batch) -> Tensor:
        """Return the prediction with another weight, and bias, in one layer."""
        with self.exchange.holding(name, tensors):
            return self._forward(name, batch)

    def _add(
        self, sums: dict[tuple[str, int], Tensor], key: tuple[str, int], error: Tensor, rows: Sequence[Row]
    ) -> None:
        power = error.double().square().flatten(1).mean(dim=1).cpu()
        weights = torch.tensor([row.weight for row in rows], dtype=torch.float64)
        total = sums.setdefault(key, torch.zeros(self.ranges, dtype=torch.float64))
        total.index_add_(0, torch.tensor([row.span for row in rows]), power * weights)
