"""Block reconstruction: learn a unit's rounding so that its output stays what it was.

Li et al., "BRECQ" (arXiv:2102.05426), as Q-Diffusion (Li et al., arXiv:2302.04304) applies it to denoisers: each unit's
rounding is learned on the unit's inputs over the whole trajectory. Where we differ from the authors' code
(q-diffusion@715783d), and why:

- The unit runs as it is deployed, its activations quantized, while its rounding is learned, and activation scales may
  be learned in the same pass instead of a second one.
- The reconstruction loss is taken relative to the start's and the regulariser relative to the number of weights
  (`quant_core.fit.adaround.learn_rounding`).
- No warm-up and a flat regulariser (exponent 4 to 2 instead of 20 to 2). Theirs leaves weights between codes until the
  end of 20,000 iterations; in a few hundred, that ended 1 dB below a closed-form start, and this ends above it.
- A result that is not better than its start is not taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.adaround import learn_rounding
from quant_core.fit.layer_rounding import nearest_codes
from quant_core.fit.unit_cache import Recording, Side, record_unit
from quant_core.fit.unit_state import UnitState, collect_state, load_states, merge_formats
from quant_core.inspect.temporal import LABEL
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QuantLayer, weight_matrix
from quant_core.nn.model import QuantizedParts, build_quantized
from quant_core.nn.ranges import QParams
from quant_spec.enums import StartCodes, UnitInputs
from quant_spec.tasks.reconstruct import Params

#: Calibration samples on which a result is compared with its start.
CHECKED_SAMPLES = 128


@dataclass(frozen=True, slots=True)
class ReconstructedUnit:
    """A unit's new state; its output's signal-to-noise ratio in dB before and after, on calibration samples."""

    state: UnitState
    sqnr_db_before: float
    sqnr_db_after: float


def reconstruct_unit(
    model: nn.Module,
    calibration: CalibrationSet,
    start: UnitState,
    earlier: list[UnitState],
    config: Params,
    scratch: Path,
    temporal: UnitState | None = None,
) -> ReconstructedUnit:
    """Learn the rounding of one unit.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser; its layers are replaced in place.
    start : UnitState
        Grids, codes and activation tables to start from.
    earlier : list of UnitState
        Units that run before; used only if inputs are quantized.
    config : Params
        `inputs`: from the full-precision model, or from that whose earlier units are quantized (the papers' way).
    scratch : Path
        Folder for recorded activations that exceed `cache_bytes`.
    temporal : UnitState, optional
        The temporal information block (`quant_core.methods.tfmq.temporal_block`): its layers run as quantized, inside
        this unit too, and are not learned again.
    """
    model.requires_grad_(False)
    unit, name = start.formats, start.formats.unit
    room = {"batch_size": config.forward_batch_size, "budget": config.cache_bytes // 2, "scratch": scratch}
    weights = {layer: model.get_parameter(f"{layer}.weight").detach() for layer in unit.layers}
    recording = record_unit(model, name, calibration, label="fp", **room)  # type: ignore[arg-type]
    has_quantized_inputs = config.inputs is UnitInputs.QUANTIZED
    fixed = ([] if temporal is None else [temporal]) + (earlier if has_quantized_inputs else [])
    quantized = [*fixed, start]
    parts = build_quantized(model, merge_formats(quantized))
    biases = {layer: None if (bias := parts.layers[layer].bias) is None else bias.clone() for layer in unit.layers}
    load_states(model, quantized)
    weights = {layer: parts.layers[layer].scaled(weight) for layer, weight in weights.items()}
    if config.start is StartCodes.NEAREST:
        for layer in unit.layers:
            _set_nearest(parts.layers[layer], weights[layer], biases[layer])
        held = collect_state(parts, unit, start.timesteps)
        start = replace(held, tensors={key: tensor.clone() for key, tensor in held.tensors.items()})
    if has_quantized_inputs and fixed:
        inputs = record_unit(model, name, calibration, label="quantized", **room).inputs  # type: ignore[arg-type]
        recording = Recording(inputs, recording.outputs)
    learner = _Learner(model.get_submodule(name), parts, recording, calibration, config)
    before = learner.error_power()
    learner.learn(weights, start)
    after = learner.error_power()
    if not after < before:
        load_states(model, [start])
        after = before
    state = collect_state(parts, unit, start.timesteps)
    return ReconstructedUnit(state, learner.sqnr_db(before), learner.sqnr_db(after))


def _set_nearest(layer: QuantLayer, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer the nearest codes on the grid that it has, and the bias of full precision."""
    grid, groups = QParams(layer.steps, layer.zero_point.float()), layer.group_index.to(weight.device)
    codes = nearest_codes(weight_matrix(weight.float()), grid, layer.bits, groups)
    layer.replace_codes(codes)
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)


class _Learner:
    """One unit, its recording, and the loop that fits its rounding."""

    def __init__(
        self,
        unit: nn.Module,
        parts: QuantizedParts,
        recording: Recording,
        calibration: CalibrationSet,
        config: Params,
    ) -> None:
        self.unit, self.parts, self.recording, self.config = unit, parts, recording, config
        self.rows, self.samples = len(calibration), calibration.samples
        self.labels = calibration.conditioning.get(LABEL)
        self.timesteps = calibration.timesteps
        self.device = next(iter(parts.layers.values())).qweight.device if parts.layers else torch.device("cpu")
        self.generator = torch.Generator().manual_seed(config.seed)
        self.checked = torch.linspace(0, self.rows - 1, min(CHECKED_SAMPLES, self.rows)).long()
        self.signal = self._power(self.recording.outputs)

    def outputs(self, index: Tensor) -> list[Tensor]:
        """Run the quantized unit on the recorded inputs of some samples."""
        label = None if self.labels is None else self.labels[index % self.samples]
        self.parts.set_timestep(self.timesteps[index // self.samples], label)
        args, kwargs = self.recording.inputs.batch(index, self.device)
        return _tensors(self.unit(*args, **kwargs))

    def targets(self, index: Tensor) -> list[Tensor]:
        """Return the full-precision outputs of the same samples."""
        return _tensors(self.recording.outputs.batch(index, self.device))

    def error_power(self) -> float:
        """Return the mean squared error of the unit as it stands, over the checked samples."""
        total = 0.0
        with torch.no_grad():
            for index in self.checked.split(self.config.batch_size):
                pairs = zip(self.outputs(index), self.targets(index), strict=True)
                total += sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        return total

    def _start_loss(self) -> float:
        """Return the reconstruction loss that the start gives."""
        with torch.no_grad():
            losses = [
                sum(float(_loss(a, b)) for a, b in zip(self.outputs(index), self.targets(index), strict=True))
                for index in self.checked.split(self.config.batch_size)
            ]
        return max(sum(losses) / len(losses), 1e-20)

    def _power(self, side: Side) -> float:
        total = 0.0
        for index in self.checked.split(self.config.batch_size):
            total += sum(float(b.double().square().sum()) for b in _tensors(side.batch(index, self.device)))
        return total

    def sqnr_db(self, error: float) -> float:
        """Return the signal-to-noise ratio of an error power."""
        return 10 * math.log10(max(self.signal, 1e-30) / max(error, 1e-30))

    def learn(self, weights: dict[str, Tensor], start: UnitState) -> None:
        """Fit the rounding variables and, if asked for, the activation scales; the unit then has the result."""
        layers = {name: self.parts.layers[name] for name in weights}
        own = [*layers.values(), *(self.parts.attentions[name] for name in start.formats.attentions)]
        tables = list(_tables(own)) if self.config.learn_activation_scales else []
        for table in tables:
            table.soft_scale = table.scale.detach().clone().requires_grad_()
        scales = [{"params": [table.soft_scale for table in tables], "lr": self.config.activation_lr}] if tables else []
        learn_rounding(layers, weights, self._batch_loss, self._start_loss(), self.config, scales)
        for table in tables:
            assert table.soft_scale is not None
            table.scale.copy_(table.soft_scale.detach().clamp(min=1e-8))
            table.soft_scale = None

    def _batch_loss(self) -> Tensor:
        """Return the reconstruction loss of a batch of drawn samples, shape ()."""
        index = torch.randint(self.rows, (self.config.batch_size,), generator=self.generator)
        pairs = zip(self.outputs(index), self.targets(index), strict=True)
        return sum((_loss(a, b) for a, b in pairs), start=torch.zeros(()))


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """Sum the squared error over dim 1 (channels; a transformer's tokens) and average over the rest, as BRECQ does."""
    return (output - target).square().sum(dim=1).mean()


def _tables(owners: Sequence[nn.Module]) -> Iterator[ActivationQuantizer]:
    """Yield the quantizers of some layers and attentions that have tables to learn."""
    for module in (module for owner in owners for module in owner.modules()):
        if isinstance(module, ActivationQuantizer) and not module.spec.is_dynamic:
            yield module


def _tensors(value: object) -> list[Tensor]:
    """Return the floating-point tensors of a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
