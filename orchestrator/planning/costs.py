"""What tasks cost: work, in GMAC that take as long on one core, and bytes of memory.

Work counts multiply-accumulates, and everything else that takes time as the MACs that would take as long. The factors
were measured on one core of a current server CPU (AMD EPYC, float32, 30 GMAC/s in convolutions). Their ratios matter;
the scale is fitted to recorded task times (`orchestrator.planning.estimate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.planning.formats import UnitPlan
from orchestrator.planning.model import LayerInfo, ModelInfo, UnitInfo
from quant_spec.passes.allocate import Allocate
from quant_spec.passes.distill import Distill
from quant_spec.passes.reconstruct import Reconstruct
from quant_spec.passes.round import Round
from quant_spec.passes.scale import Scale
from quant_spec.passes.temporal import Temporal
from quant_spec.recipe import Recipe

GIB = 2**30
#: A worker process with torch and diffusers loaded and nothing to do.
WORKER_BYTES = int(0.7 * GIB)

_CALL = 2.5e6  # one layer called, with the norms and activations around it: 0.08 ms
_QUANTIZE = 15.0  # one element quantized and dequantized: 0.5 ns
_DEQUANTIZE = 120.0  # one packed weight unpacked: 4 ns
_TRAIN_WEIGHT = 600.0  # one weight's soft rounding, its gradient and its Adam step: 20 ns
_TRAIN_ELEMENT = 60.0  # one element quantized, with its gradient: 2 ns
_SEARCH = 12_000.0  # one weight in the search of a range, 80 candidates: 0.4 µs
_COLUMN = 1.6e6  # one column visited by closed-form rounding: 55 µs
_COLUMN_WEIGHT = 5.0  # and each weight that a visit corrects
_SCALED_WEIGHT = 900.0  # one weight in one iteration of learned scales, with its gradient: 30 ns
_VOTE_POSITIONS = 64  # quant_core.methods.dmq.scaling.VOTE_POSITIONS
_CHANNEL = 60.0  # one element looked at by channel: 2 ns
_BACKWARD = 2.0  # of a forward
_EFFECT_SAMPLES = 2  # rows of each step in a forward for each layer
_RELATION = 500.0  # one pair of positions related, with gradient: 17 ns
_TEMPORAL_ROUND = Round(method="closed_form")
_EXTRACTOR = {"efficientnet-lite0": 1.1, "inception-v3": 6.0}  # per image
_EXTRACTOR_BYTES = {"efficientnet-lite0": 0.5 * GIB, "inception-v3": 1.2 * GIB}


@dataclass(frozen=True, slots=True)
class Cost:
    """Work in GMAC and memory in bytes."""

    work: float
    memory_bytes: int


class Costs:
    """Costs of the tasks that one recipe needs for one model."""

    def __init__(self, model: ModelInfo, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.calls_per_sample = recipe.sampler.num_inference_steps * recipe.sampler.calls_per_step
        recorded = recipe.calibration.steps or recipe.sampler.num_inference_steps
        #: denoiser inputs in the calibration set, per seed
        self.recorded_per_seed = recorded * recipe.sampler.calls_per_step
        self.model_bytes = 4 * model.parameters
        widest = max(unit.input_bytes + unit.output_bytes for unit in model.units)
        #: what is alive at once in a forward, per sample
        self.live_bytes = min(model.activation_bytes, 6 * widest)
        self.sample_bytes = 4 * _product(model.sample_shape)
        self.layers = len(model.layers)
        self.weights = sum(unit.weights for unit in model.units)
        self.elements = sum(unit.input_elements for unit in model.units)

    def sample(self, seeds: int, batch: int, *, recorded: int = 0) -> Cost:
        """Sampling with the full-precision model, of which some seeds' steps are kept."""
        kept = recorded * self.calls_per_sample * self.sample_bytes * 2
        return Cost(self._forward(seeds * self.calls_per_sample, batch), self._memory(batch, kept))

    def round(self, group: Sequence[UnitPlan], config: Round) -> Cost:
        """Rounding a group of units: one pass over the calibration set as far as the last of them."""
        seeds, batch = self.recipe.calibration.seeds, self.recipe.calibration.batch_size
        passes = self._forward(seeds * self.recorded_per_seed, batch) * group[-1].unit.depth
        measured = sum(plan.unit.input_elements for plan in group) * seeds * self.recorded_per_seed
        work = passes + _giga(measured * _QUANTIZE)
        hessians = 0
        for plan in group:
            for layer in plan.unit.layers:
                if layer.name in plan.layers:
                    work += self._round_layer(layer, plan.layers[layer.name], config)
            hessians += hessian_bytes(plan.unit, config)
        return Cost(work, self._memory(batch, self._cached(hessians) + 3 * self._largest_hessian(group, config)))

    def scale(self, group: Sequence[UnitPlan], config: Scale, rounding: Round) -> Cost:
        """Choosing the factors of a group of units: one pass over the calibration set, then iterations on weights."""
        seeds, batch = self.recipe.calibration.seeds, self.recipe.calibration.batch_size
        samples = seeds * self.recorded_per_seed
        elements = sum(plan.unit.input_elements for plan in group) * samples
        work = self._forward(samples, batch) * group[-1].unit.depth + _giga(elements * _CHANNEL)
        held = 0
        if config.method == "learned":
            for plan in group:
                for layer in plan.unit.layers:
                    rows = min(config.samples, seeds) * self.recorded_per_seed * min(config.positions, layer.positions)
                    work += _giga(rows * layer.columns**2 + layer.columns**3 / 3)
                    work += _giga(config.iterations * layer.weights * _SCALED_WEIGHT)
                held += plan.unit.hessian_bytes
        return Cost(work, self._memory(batch, self._cached(held) + self._votes(group, config)))

    def _votes(self, group: Sequence[UnitPlan], config: Scale) -> float:
        """Return the bytes of the positions that are kept for the vote on power-of-two steps."""
        kept = min(config.samples, self.recipe.calibration.seeds) * self.recorded_per_seed * _VOTE_POSITIONS
        channels = sum(
            layer.shape[1]
            for plan in group
            for layer in plan.unit.layers
            if config.shift == "variance" or (config.shift == "skip" and layer.split)
        )
        return 4.0 * kept * channels

    def channel_errors(self, group: Sequence[UnitPlan], config: Allocate) -> Cost:
        """Measuring layers at three widths: ranges over the calibration set, then forwards for each layer."""
        calibration = self.recipe.calibration
        depth = group[-1].unit.depth
        samples = min(config.samples, calibration.seeds) * self.recorded_per_seed
        layers = [
            layer for plan in group for layer in plan.unit.layers if "allocated" in plan.layers.get(layer.name, {})
        ]
        work = self._forward(calibration.seeds * self.recorded_per_seed, calibration.batch_size) * depth
        work += self._forward(samples, config.samples) * depth
        work += self._forward(min(samples, _EFFECT_SAMPLES * self.recorded_per_seed), calibration.batch_size) * len(
            layers
        )
        for layer in layers:
            rows = samples * min(config.positions, layer.positions)
            work += _giga(layer.weights * (3 * _SEARCH + 5 * rows) + samples * layer.input_elements * _QUANTIZE)
        held = sum(4 * 5 * layer.weights for layer in layers)
        return Cost(work, self._memory(calibration.batch_size, held))

    def distill(self, config: Distill) -> Cost:
        """Tuning the whole model: iterations forward and back, the full-precision model beside it for relations."""
        batch = config.batch_size
        step = batch * self.model.gmacs * (1 + _BACKWARD) + _giga(
            3 * self.layers * _CALL + self.weights * _TRAIN_WEIGHT + batch * self.elements * _TRAIN_ELEMENT
        )
        if config.relations:
            step += self._forward(batch, batch) + _giga(batch * config.positions**2 * _RELATION)
        graph = batch * 4 * self.elements * 12 + self.weights * 4 * 16
        return Cost(config.iterations * step, int(WORKER_BYTES + 2 * self.model_bytes + graph))

    def temporal(self, plan: UnitPlan, config: Temporal) -> Cost:
        """Learning the temporal information block: iterations over its finite set, which is small."""
        unit = plan.unit
        step = _giga(len(unit.layers) * _CALL * (1 + _BACKWARD) + unit.weights * _TRAIN_WEIGHT * 2)
        iterations = config.iterations if config.method == "reconstruct" else 0
        rounding = sum(self._round_layer(layer, plan.layers[layer.name], _TEMPORAL_ROUND) for layer in unit.layers)
        return Cost((iterations + 2 * len(unit.layers)) * step + rounding, self._memory(1, unit.weights * 4 * 8))

    def reconstruct(self, plan: UnitPlan, config: Reconstruct) -> Cost:
        """Learning one unit: its inputs and outputs are recorded, then iterations on mini-batches."""
        unit, seeds = plan.unit, self.recipe.calibration.seeds
        samples = seeds * self.recorded_per_seed
        passes = self._forward(samples, self.recipe.calibration.batch_size) * unit.depth
        if config.inputs == "quantized":
            passes += self._quantized_forward(samples, self.recipe.calibration.batch_size) * unit.depth
        batch = config.batch_size
        step = batch * unit.gmacs * (1 + _BACKWARD) + _giga(
            len(unit.layers) * _CALL * (1 + _BACKWARD)
            + unit.weights * _TRAIN_WEIGHT
            + batch * unit.input_elements * _TRAIN_ELEMENT
        )
        graph = batch * 4 * unit.input_elements * 8 + unit.weights * 4 * 8
        cache = self._cached(samples * (unit.input_bytes + unit.output_bytes))
        models = 2 if config.inputs == "quantized" else 1
        memory = WORKER_BYTES + models * self.model_bytes + graph + cache
        live = self.recipe.calibration.batch_size * self.live_bytes
        return Cost(passes + config.iterations * step, int(max(memory, WORKER_BYTES + self.model_bytes + live)))

    def step_effects(self, seeds: int, batch: int, choices: int) -> Cost:
        """Sampling from every step on, for every choice of bits; ranges before that."""
        steps = self.recipe.sampler.num_inference_steps
        per_step = self.recipe.sampler.calls_per_step
        ranges = self.recipe.calibration.seeds * self.recorded_per_seed
        calls = seeds * per_step * (steps + choices * (steps * (steps - 1) // 2))
        work = self._forward(ranges, self.recipe.calibration.batch_size) + self._forward(calls, batch)
        work += _giga(ranges * self.elements * _QUANTIZE) + self._quantized_forward(
            seeds * per_step * choices * steps, batch
        )
        kept = seeds * steps * (per_step + 3 * choices) * self.sample_bytes
        return Cost(work, self._memory(batch, kept + 2 * self.model_bytes))

    def step_bits(self) -> Cost:
        """Choosing among measured effects."""
        return Cost(0.0, WORKER_BYTES)

    def noise(self, seeds: int, batch: int) -> Cost:
        """Predictions of the packed model along recorded trajectories."""
        return Cost(
            self._quantized_forward(seeds * self.calls_per_sample, batch), self._memory(batch, self.model_bytes)
        )

    def correct(self) -> Cost:
        """Fitting some numbers for each step."""
        return Cost(0.0, WORKER_BYTES)

    def pack(self) -> Cost:
        """Putting all states into one folder."""
        return Cost(_giga(self.weights * _DEQUANTIZE), WORKER_BYTES + 3 * self.model_bytes)

    def evaluate(self, seeds: int, batch: int, sqnr_seeds: int) -> Cost:
        """Sampling with the packed model, and its predictions along the references' trajectories."""
        calls = (seeds + sqnr_seeds) * self.calls_per_sample
        kept = sqnr_seeds * self.calls_per_sample * self.sample_bytes * 2
        return Cost(self._quantized_forward(calls, batch), self._memory(batch, kept + self.model_bytes))

    def score(self) -> Cost:
        """Features of all samples, twice, and the metrics over them."""
        evaluation = self.recipe.evaluation
        samples = 2 * evaluation.seeds
        memory = (
            WORKER_BYTES + self.model_bytes + _EXTRACTOR_BYTES[evaluation.extractor] + 2 * samples * self.sample_bytes
        )
        return Cost(samples * _EXTRACTOR[evaluation.extractor] + self._forward(1, 1), int(memory))

    def release(self) -> Cost:
        """Writing the card and the manifest."""
        return Cost(0.0, WORKER_BYTES)

    def _forward(self, samples: int, batch: int) -> float:
        """Full-precision denoiser calls on so many rows, GMAC."""
        return samples * self.model.gmacs + _giga(-(-samples // batch) * self.layers * _CALL)

    def _quantized_forward(self, samples: int, batch: int) -> float:
        """Quantized denoiser calls on so many rows, GMAC."""
        calls = -(-samples // batch)
        return self._forward(samples, batch) + _giga(
            calls * self.weights * _DEQUANTIZE + samples * self.elements * _QUANTIZE
        )

    def _round_layer(self, layer: LayerInfo, spec: Mapping[str, Any], config: Round) -> float:
        """Range search, Hessian and closed-form rounding of one layer, GMAC."""
        macs = layer.weights * _SEARCH if spec["weight_range"]["method"] == "mse" else 0.0
        if config.method == "closed_form":
            seeds = min(config.samples, self.recipe.calibration.seeds)
            rows = seeds * self.recorded_per_seed * min(config.positions, layer.positions)
            macs += rows * layer.columns**2 + 2 * layer.columns**3
            macs += layer.columns * (_COLUMN + layer.weights * _COLUMN_WEIGHT)
        return _giga(macs)

    def _largest_hessian(self, group: Sequence[UnitPlan], config: Round) -> int:
        if config.method != "closed_form":
            return 0
        return max(4 * layer.columns**2 for plan in group for layer in plan.unit.layers)

    def _cached(self, needed: float) -> float:
        """Return the memory that a cache takes within the recipe's budget."""
        return min(needed, self.recipe.memory.budget_gib * GIB)

    def _memory(self, batch: int, extra: float) -> int:
        return int(WORKER_BYTES + self.model_bytes + batch * self.live_bytes + extra)


def hessian_bytes(unit: UnitInfo, config: Round) -> int:
    """Return the bytes of the second moments that rounding a unit accumulates."""
    return unit.hessian_bytes if config.method == "closed_form" else 0


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _giga(macs: float) -> float:
    return macs / 1e9
