"""Distil a quantized model from its full-precision one, end to end: low-rank tuning of weights, grids learned too.

What is learned, per layer: B A and the weight's grid (`quant_core.methods.mpqdm.low_rank`), the bias, and the scale and
zero point of each activation at each trajectory step (TALSQ: He et al., "EfficientDM", arXiv:2310.03270, Sec. 3.3). The
loss is EfficientDM's, plus MPQ-DM's time-smoothed relations (`quant_core.methods.mpqdm.relation`):

    L = |eps_q(x_t, t) - eps(x_t, t)|^2 + weight * L_TRD        per sample, features of the last block before the output

Data-free: inputs are the full-precision sampler's own trajectories from noise, with its predictions, recorded once.
Where we differ from the authors' code (EfficientDM@293e212, mpq-dm@2b05dd7), and why:

- The step index comes from the timestep of each sample (`quant_core.nn.steps`), not from a counter of forwards, so that
  a batch mixes steps: an iteration sees several, where the authors walk through the trajectory one step at a time.
- The relation loss has a gradient, through both steps of a pair, which are in the same batch.
- Rates are relative: of B A to the layer's mean step (theirs is 1 / 2500 of it for 16,000 updates), of scales as
  exponents. Biases are learned too; they are stored in full precision anyway.
- With guidance each prediction counts by itself, not their combination.
- A result that is not better than its start is not taken (`Distilled.is_taken`).
- Runs of steps begin anywhere, so the first and the last step of the trajectory are in half as many as the others,
  and count twice where steps are weighted.
- Steps can be weighted by what their error does to the final sample (`DistillFit.effect`): at 20 steps the first two
  make most of it, and a few percent of the unweighted loss.

With frozen codes (`Params.codes`), the codes and zero points of weights stay, and what stands around them is learned:
scales (`quant_core.methods.mpqdm.scaled_weight`), biases, the affine parameters of norms, which stay in full precision,
and the activations' grids. It needs neither the original weights nor, for most of them, a gradient.

A run may stop after any iteration and go on from its checkpoint: the result is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers.models.normalization import RMSNorm
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quant_core.diffusion.calibration import Batch, CalibrationSet, replay
from quant_core.diffusion.conditioning import seed_stream
from quant_core.fit.unit_state import UnitState, collect_state, load_states, merge_formats
from quant_core.methods.mpqdm.learned_table import LearnedTable
from quant_core.methods.mpqdm.low_rank import LowRankWeight
from quant_core.methods.mpqdm.relation import relation_loss
from quant_core.methods.mpqdm.scaled_weight import ScaledWeight
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.model import build_quantized
from quant_spec.enums import WeightCodes
from quant_spec.errors import QuantizationError
from quant_spec.tasks.distill import Params

#: Consecutive trajectory steps whose features are averaged before they are related.
WINDOW = 2
#: Modules whose parameters are an affine map of what they normalize.
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RMSNorm)
#: Trajectory samples on which a result is compared with its start.
CHECKED_SAMPLES = 160


@dataclass(frozen=True, slots=True)
class Distilled:
    """States of all units in the order given, and the mean loss of the prediction before and after.

    `is_taken`: whether the states are what was learned; the start's otherwise, if learning made nothing better.
    """

    states: list[UnitState]
    loss_before: float
    loss_after: float
    is_taken: bool


class Distillation:
    """One run: `step` until `iteration` reaches the config's, then `finish`.

    Parameters
    ----------
    teacher, model : nn.Module
        The full-precision denoiser, twice; the layers of the second are replaced in place.
    states : sequence of UnitState
        Of all units, in the order in which they run.
    trajectories : CalibrationSet
        With predictions.
    gains : sequence of float, optional
        Error power of the final sample per error power of each step's prediction; needed if `config.effect` is not 0.
    """

    def __init__(
        self,
        teacher: nn.Module,
        model: nn.Module,
        states: Sequence[UnitState],
        trajectories: CalibrationSet,
        config: Params,
        gains: Sequence[float] | None = None,
    ) -> None:
        self.teacher, self.model = teacher, model.requires_grad_(False)
        self.trajectories, self.config = trajectories, config
        self.states = list(states)
        self.window = min(WINDOW, trajectories.steps)
        self.step_weights = _step_weights(gains, config.effect, trajectories.steps)
        self._drawn = _drawn(trajectories.steps, self.window)
        self.is_frozen = config.codes is WeightCodes.FROZEN
        originals = [] if self.is_frozen else [name for state in states for name in state.formats.layers]
        weights = {name: model.get_parameter(f"{name}.weight").detach() for name in originals}
        self.parts = build_quantized(model, merge_formats(self.states))
        load_states(model, self.states)
        self.feature = feature_unit(self.states)
        self.loss_before = self._checked_loss()
        self.tuned: dict[str, LowRankWeight | ScaledWeight] = {
            name: ScaledWeight(layer)
            if self.is_frozen
            else LowRankWeight(layer, weights[name], config.rank, seed_stream(config.seed, f"low rank of {name}"))
            for name, layer in self.parts.layers.items()
        }
        self.norms = norm_parameters(model) if self.is_frozen else {}
        self.tables = {
            name: LearnedTable(module)
            for name, module in model.named_modules()
            if isinstance(module, ActivationQuantizer) and not module.spec.is_dynamic
        }
        self.learned = dict(self._learned())
        # Few groups, all of whose parameters move at once: models that this is cheap for have hundreds of small ones.
        self._rates = sorted({rate for _, rate in self.learned.values()})
        groups = [
            {"params": [parameter for parameter, own in self.learned.values() if own == rate], "lr": rate}
            for rate in self._rates
        ]
        self.optimizer = torch.optim.Adam(groups, foreach=True if self.is_frozen else None)
        self.iteration = 0

    def _learned(self) -> Iterator[tuple[str, tuple[Tensor, float]]]:
        """Yield what is learned: names, each with its tensor and its rate."""
        config = self.config
        rates = {"log_scale": config.weight_lr, "zero_point": config.zero_point_lr, "bias": config.bias_lr}
        for name, tuned in self.tuned.items():
            own = rates if self.is_frozen else rates | dict.fromkeys("ab", config.lr * float(tuned.layer.steps.mean()))
            for what, parameter in tuned.parameters().items():
                yield f"{name}.{what}", (parameter, own[what])
        for name, parameter in self.norms.items():
            yield name, (parameter.requires_grad_(), config.norm_lr)
        for name, table in self.tables.items():
            yield f"{name}.log_scale", (table.log_scale, config.activation_lr)
            if table.zero_point.requires_grad:
                yield f"{name}.zero_point", (table.zero_point, config.zero_point_lr)

    def step(self) -> float:
        """Make one iteration; returns the loss of its batch.

        Raises
        ------
        QuantizationError
            If the loss is not finite.
        """
        config = self.config
        generator = seed_stream(config.seed, f"batch {self.iteration}")
        batch, target, weights = self._draw(generator)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * (1 - self.iteration / config.iterations)
        with self._soft(), _outputs(self.model, self.feature) as features:
            prediction = replay(self.model, batch)
            loss = ((prediction - target).square() * weights).sum() / len(batch)
            if config.relations:
                with torch.no_grad(), _outputs(self.teacher, self.feature) as wanted:
                    replay(self.teacher, batch)
                drawn = self._positions(features[0], generator)
                loss = loss + config.relation_weight * relation_loss(features[0], wanted[0], self.window, drawn)
            if not bool(loss.isfinite()):
                raise QuantizationError(
                    f"distill: got a loss of {float(loss.detach())} at iteration {self.iteration}, wanted a finite "
                    "one; lower passes.distill.lr and the other rates"
                )
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.iteration += 1
        return float(loss.detach())

    def _draw(self, generator: torch.Generator) -> tuple[Batch, Tensor, Tensor]:
        """Draw runs of consecutive steps; return the batch, the full-precision predictions, and what each counts."""
        runs, of = max(1, self.config.batch_size // self.window), self.trajectories
        row = torch.randint(of.samples, (runs,), generator=generator)
        first = torch.randint(of.steps - self.window + 1, (runs,), generator=generator)
        index = ((first[:, None] + torch.arange(self.window)) * of.samples + row[:, None]).flatten()
        target = of.predictions(index).to(self._device)
        weights = torch.ones(len(index), dtype=torch.float64)
        if self.config.effect:
            weights = (self.step_weights / self._drawn)[index // of.samples]
        return of.gather(index), target, weights.to(target).view(-1, *[1] * (target.dim() - 1))

    def _positions(self, feature: Tensor, generator: torch.Generator) -> Tensor | None:
        """Draw the positions of a feature that are related; None for all."""
        count = feature.shape[1] if feature.dim() == 3 else feature[0, 0].numel()
        if count <= self.config.positions:
            return None
        return torch.randperm(count, generator=generator)[: self.config.positions].to(feature.device)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parts.layers.values())).qweight.device

    @contextmanager
    def _soft(self) -> Iterator[None]:
        """Let the model run with what has been learned so far, exactly as it would be stored."""
        stored = {name: layer.bias for name, layer in self.parts.layers.items()}
        for tuned in self.tuned.values():
            tuned.apply()
            if tuned.bias is not None:
                tuned.layer.bias = tuned.bias
        for table in self.tables.values():
            table.apply()
        try:
            yield
        finally:
            for name, tuned in self.tuned.items():
                tuned.release()
                tuned.layer.bias = stored[name]
            for table in self.tables.values():
                table.release()

    @torch.no_grad()
    def _checked_loss(self) -> float:
        """Return the mean loss of the predictions of the model as it is stored."""
        count = len(self.trajectories)
        total, index = 0.0, torch.linspace(0, count - 1, min(CHECKED_SAMPLES, count)).long()
        for chunk in index.split(self.config.batch_size):
            difference = replay(self.model, self.trajectories.gather(chunk)).cpu() - self.trajectories.predictions(
                chunk
            )
            power = difference.double().square().flatten(1).sum(1)
            total += float((power * self.step_weights[chunk // self.trajectories.samples]).sum())
        return total / len(index)

    def checkpoint(self) -> bytes:
        """Return all that the next iterations depend on."""
        tensors = {"iteration": torch.tensor(self.iteration)}
        for name, (parameter, _) in self.learned.items():
            tensors[f"{name}:value"] = parameter.detach()
            for what, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}:{what}"] = value
        return save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})

    @torch.no_grad()
    def restore(self, data: bytes) -> None:
        """Go on from a checkpoint of a run with the same arguments."""
        tensors = load(data)
        self.iteration = int(tensors.pop("iteration"))
        for name, (parameter, _) in self.learned.items():
            parameter.copy_(tensors[f"{name}:value"])
            names = ("step", "exp_avg", "exp_avg_sq") if f"{name}:step" in tensors else ()
            # torch counts steps on the CPU, whatever the device
            own = {what: tensors[f"{name}:{what}"] for what in names}
            if own:
                moments = {what: own[what].to(parameter.device) for what in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": own["step"], **moments}

    def finish(self) -> Distilled:
        """Store what was learned, and return the units' states; the start's if they are not worse."""
        for tuned in self.tuned.values():
            tuned.commit()
        for table in self.tables.values():
            table.commit()
        after = self._checked_loss()
        if not after < self.loss_before:
            return Distilled(self.states, self.loss_before, self.loss_before, is_taken=False)
        states = [_collected(self, state) for state in self.states]
        for name, parameter in self.norms.items():
            home = next((place for place, s in enumerate(states) if name.startswith(f"{s.formats.unit}.")), -1)
            states[home] = replace(states[home], tensors={**states[home].tensors, name: parameter.detach().clone()})
        return Distilled(states, self.loss_before, after, is_taken=True)


def _step_weights(gains: Sequence[float] | None, effect: float, steps: int) -> Tensor:
    """Return what each step's loss counts, 1 on average, shape (S,), float64."""
    if not effect:
        return torch.ones(steps, dtype=torch.float64)
    if gains is None or len(gains) != steps:
        raise QuantizationError(f"distill: got gains of {len(gains or ())} steps, wanted {steps}, those distilled from")
    powers = torch.tensor(gains, dtype=torch.float64).clamp(min=0) ** effect
    return powers / powers.mean().clamp(min=1e-30)


def _drawn(steps: int, window: int) -> Tensor:
    """Return how often each step is in a run that begins anywhere, 1 on average, shape (S,), float64."""
    counts = torch.zeros(steps, dtype=torch.float64)
    for first in range(steps - window + 1):
        counts[first : first + window] += 1
    return counts / counts.mean()


def _collected(run: Distillation, state: UnitState) -> UnitState:
    """Take a unit's tensors out of the model."""
    found = collect_state(run.parts, state.formats, state.timesteps)
    return UnitState(found.formats, found.timesteps, {name: t.detach().clone() for name, t in found.tensors.items()})


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights and biases of a model's norms, which are never quantized, by name."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
        for leaf, parameter in module.named_parameters(recurse=False)
    }


def feature_unit(states: Sequence[UnitState]) -> str:
    """Return the unit whose output is the feature: the last with two layers or more, the block before the output."""
    units = [s.formats.unit for s in states if not s.formats.unit.startswith("@")]
    blocks = [s.formats.unit for s in states if len(s.formats.layers) > 1 and not s.formats.unit.startswith("@")]
    return (blocks or units)[-1]


@contextmanager
def _outputs(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Yield a list that takes the first tensor of what a module gives, at each forward."""
    found: list[Tensor] = []

    def see(_: nn.Module, __: object, output: object) -> None:
        found.append(next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)))

    handle = model.get_submodule(name).register_forward_hook(see)
    try:
        yield found
    finally:
        handle.remove()
