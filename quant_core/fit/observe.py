"""One pass over a calibration set that watches the inputs of a full-precision model's layers and attentions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.conditioning import seed_stream
from quant_core.fit.channel_stats import ChannelStats
from quant_core.fit.hessian import SecondMoment, input_rows
from quant_core.nn.attention import OPERANDS, AttentionFunction, softmax_scores, wrap_processor
from quant_core.nn.ranges import QParams, choose_fp8_scale, choose_qparams, qparams_from_range
from quant_spec.enums import ActivationMode, RangeMethod
from quant_spec.formats import ActivationSpec, LayerSpec
from quant_spec.ranges import RangeSpec

#: Values kept of one tensor at one trajectory step, for the estimators that need more than its extremes.
VALUES_PER_STEP = 16384


@dataclass(slots=True)
class StepRanges:
    """What is remembered of one tensor: its extremes at each step and, if asked for, a seeded draw of its values."""

    steps: int
    keep_values: bool
    low: Tensor = field(init=False)
    high: Tensor = field(init=False)
    values: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.low, self.high = torch.full((self.steps,), torch.inf), torch.full((self.steps,), -torch.inf)
        self.values = [[] for _ in range(self.steps)]

    def update(self, step: int, x: Tensor, draw: int, generator: torch.Generator) -> None:
        """Add a batch of one step, of which `draw` values at most are kept."""
        low, high = torch.aminmax(x.detach())
        self.low[step] = min(self.low[step], low.float().cpu())
        self.high[step] = max(self.high[step], high.float().cpu())
        if self.keep_values:
            flat = x.detach().flatten()
            if len(flat) > draw:
                flat = flat[torch.randint(len(flat), (draw,), generator=generator).to(flat.device)]
            self.values[step].append(flat.float().cpu())

    def repeat(self, alike: Sequence[int]) -> None:
        """Let each step have what was seen at the one that it is like."""
        self.low, self.high = self.low[list(alike)], self.high[list(alike)]
        self.values = [self.values[step] for step in alike]

    def qparams(self, spec: ActivationSpec, ranges: RangeSpec) -> QParams:
        """Return the tables of a static or per-step quantizer, shape (S,) or (1,)."""
        low, high, values = self.low, self.high, self.values
        if spec.mode is ActivationMode.STATIC:
            low, high = low.min()[None], high.max()[None]
            values = [[value for step in values for value in step]]
        if ranges.method is RangeMethod.MINMAX and spec.is_float:
            return choose_fp8_scale(torch.stack([low, high], dim=1), ranges)
        if ranges.method is RangeMethod.MINMAX and not spec.step_bits:
            return qparams_from_range(low, high, spec.bits, symmetric=spec.symmetric)
        tables = []
        for at, step in enumerate(values):
            # The extremes were perhaps not drawn, and shrinking starts from them.
            row = torch.cat([*step, low[at, None], high[at, None]])
            if spec.is_float:
                tables.append(choose_fp8_scale(row, ranges))
                continue
            bits = spec.step_bits[at] if spec.step_bits else spec.bits
            tables.append(choose_qparams(row, bits, symmetric=spec.symmetric, spec=ranges))
        return QParams(torch.stack([t.scale for t in tables]), torch.stack([t.zero_point for t in tables]))


@dataclass(frozen=True, slots=True)
class Watched:
    """What to watch in the forwards of a model.

    Attributes
    ----------
    layers : mapping of str to LayerSpec
        Layers whose input's range is taken, of each part where the format splits it.
    attentions : sequence of str
        Attentions whose operands' ranges are taken.
    moments : sequence of str
        Layers whose input's second moment is taken, over the first `samples` rows of the calibration set (all if None)
        and `positions` output positions of each (all if None).
    keep_values : bool
        Whether values are drawn and kept beside the extremes of a range.
    channel_scales : mapping of str to Tensor, shape (C_in,)
        What the channels of a layer's input are divided by before its range and second moment are taken.
    channels : mapping of str to int
        Layers whose input channels are looked at one by one, and how many positions are kept of each of the first
        `samples` rows.
    fit_rows : int or None
        Rows of the calibration set, the first, that scales are fitted to (`ChannelStats.fit_low`); all if None.
    """

    layers: Mapping[str, LayerSpec]
    attentions: Sequence[str]
    moments: Sequence[str]
    positions: int | None
    samples: int | None
    keep_values: bool
    channel_scales: Mapping[str, Tensor] = field(default_factory=dict)
    channels: Mapping[str, int] = field(default_factory=dict)
    fit_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen.

    `ranges`: by layer name and part number, or attention name and operand. `moments`: of layers' inputs, by layer.
    `channels`: statistics of the channels of layers' inputs, before they are divided by channel scales.
    """

    ranges: dict[tuple[str, int | str], StepRanges]
    moments: dict[str, SecondMoment]
    channels: dict[str, ChannelStats] = field(default_factory=dict)


class _Enough(Exception):
    """Ends a forward once the last watched unit has run; a signal, not an error."""


@contextmanager
def stop_after(model: nn.Module, units: Sequence[str]) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Yield a caller that runs a forward of `model` only until all of `units` have run."""
    waiting: set[str] = set()

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            waiting.discard(name)
            if not waiting:
                raise _Enough

        return hook

    handles = [model.get_submodule(name).register_forward_hook(leave(name)) for name in units]

    def call(forward: Callable[[], object]) -> None:
        waiting.clear()
        waiting.update(units)
        try:
            forward()
        except _Enough:
            return

    try:
        yield call
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: nn.Module,
    calibration: CalibrationSet,
    units: Sequence[str],
    watched: Watched,
    *,
    batch_size: int,
    seed: int,
) -> Observation:
    """Run the full-precision model over the calibration set, each batch of one step, until the last of `units`.

    Steps at the same timestep are one to a model that finds its step by the timestep: each has what all of them saw.

    Random draws depend on the seed and on the name of what is watched, so that a layer's observation is the same
    whatever is watched beside it.

    Peak memory is that of one forward of `batch_size` samples plus 4 K^2 bytes per second moment of K columns.
    """
    found = Observation({}, {})
    current = _Current(step=0, first_row=0, draw=_draw(calibration, batch_size))
    with ExitStack() as stack:
        for name in {*watched.layers, *watched.moments, *watched.channels}:
            hook = _layer_hook(name, watched, found, current, calibration.steps, seed)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for name in watched.attentions:
            function = _attention_watcher(name, watched.keep_values, found, current, calibration.steps, seed)
            stack.callback(wrap_processor(model.get_submodule(name), function))
        call = stack.enter_context(stop_after(model, units))
        stack.enter_context(torch.no_grad())
        rows, last, alike = 0, 0, calibration.first_alike
        for batch in calibration.by_step(batch_size):
            step = int(batch.step[0])
            rows = rows + len(batch) if step == last and rows < calibration.samples else len(batch)
            last, current.step, current.first_row = step, alike[step], rows - len(batch)
            call(lambda batch=batch: replay(model, batch))  # type: ignore[misc]
    for ranges in found.ranges.values():
        ranges.repeat(alike)
    for channels in found.channels.values():
        channels.repeat(alike)
    return found


@dataclass(slots=True)
class _Current:
    """The batch that is running: its step, the calibration row that it starts at, values to draw from it."""

    step: int
    first_row: int
    draw: int


def _draw(calibration: CalibrationSet, batch_size: int) -> int:
    batches = -(-calibration.samples // batch_size)
    return max(1, VALUES_PER_STEP // batches)


def _layer_hook(
    name: str, watched: Watched, found: Observation, current: _Current, steps: int, seed: int
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    spec, channel_scale = watched.layers.get(name), watched.channel_scales.get(name)
    for_values, for_rows = seed_stream(seed, f"values of {name}"), seed_stream(seed, f"rows of {name}")
    for_channels = seed_stream(seed, f"channels of {name}")

    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        dim = -1 if isinstance(layer, nn.Linear) else 1
        if name in watched.channels:
            if name not in found.channels:
                found.channels[name] = ChannelStats(steps, x.shape[dim], watched.channels[name])
            fit_rows, drawn_rows = (
                None if last is None else max(last - current.first_row, 0)
                for last in (watched.fit_rows, watched.samples)
            )
            found.channels[name].update(current.step, x.movedim(dim, -1), for_channels, fit_rows, drawn_rows)
        if channel_scale is not None:
            x = x / channel_scale.to(x.device).reshape(-1, *(1,) * (x.dim() - 2 if dim == 1 else 0))
        if spec is not None:
            for part, values in enumerate(x.split(spec.split, dim=dim) if spec.split else (x,)):
                ranges = found.ranges.setdefault((name, part), StepRanges(steps, watched.keep_values))
                ranges.update(current.step, values, current.draw, for_values)
        if name in watched.moments:
            wanted = len(x) if watched.samples is None else watched.samples - current.first_row
            if wanted <= 0:
                return
            rows = input_rows(layer, x[:wanted], watched.positions, for_rows)
            found.moments.setdefault(name, SecondMoment(rows.shape[1], rows.device)).update(rows)

    return hook


def _attention_watcher(
    name: str, keep_values: bool, found: Observation, current: _Current, steps: int, seed: int
) -> AttentionFunction:
    generator = seed_stream(seed, f"values of {name}")

    def watch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
        probabilities = softmax_scores(query, key, mask, scale)
        for operand, x in zip(OPERANDS, (query, key, value, probabilities), strict=True):
            ranges = found.ranges.setdefault((name, operand), StepRanges(steps, keep_values))
            ranges.update(current.step, x, current.draw, generator)
        # The model's own attention goes on: units behind see the same bits, whether this one is watched or not.

    return watch
