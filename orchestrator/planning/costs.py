"""What tasks cost: work, in GMAC that take as long on one core, and bytes of memory.

Work counts multiply-accumulates, and everything else that takes time as the MACs that would take as long. The factors
were measured on one core of a current server CPU (AMD EPYC, float32, 30 GMAC/s in convolutions). Their ratios matter;
the scale is fitted to recorded task times (`orchestrator.planning.estimate`).

Here is what several passes count with; what one pass alone does is in its file in `orchestrator.planning.passes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.planning.model import LayerInfo, ModelInfo, UnitInfo
from quant_spec.enums import RangeMethod, RoundingMethod
from quant_spec.passes.round import RoundFit
from quant_spec.planned import PlannedLayer
from quant_spec.recipe import Recipe
from workers.execution.cluster import CUDA_CONTEXT_BYTES

GIB = 2**30
#: A worker process with torch and diffusers loaded and nothing to do.
WORKER_BYTES = int(0.7 * GIB)

#: What a backward pass costs, in forward passes.
BACKWARD = 2.0
#: MACs of one layer called, with the norms and activations around it: 0.08 ms.
CALL = 2.5e6
#: MACs of one element quantized and dequantized: 0.5 ns.
QUANTIZE = 15.0
#: MACs of one packed weight unpacked: 4 ns.
DEQUANTIZE = 120.0
#: MACs of one weight's soft rounding, its gradient and its Adam step: 20 ns.
TRAIN_WEIGHT = 600.0
#: MACs of one element quantized, with its gradient: 2 ns.
TRAIN_ELEMENT = 60.0
#: MACs of one weight in the search of a range, 80 candidates: 0.4 µs.
SEARCH = 12_000.0
#: Bytes of packed weights with scales and what is not quantized, by those of the codes.
_GRIDS = 1.15
_COLUMN = 1.6e6  # one column visited by closed-form rounding: 55 µs
_COLUMN_WEIGHT = 5.0  # and each weight that a visit corrects


@dataclass(frozen=True, slots=True)
class Cost:
    """Work in GMAC and memory in bytes.

    `memory_bytes` is all that the task holds where it runs on CPUs; `host_bytes` of it stay in the host's memory where
    it runs on a GPU: caches and what is read and written in files.
    """

    work: float
    memory_bytes: int
    host_bytes: float = 0.0

    @property
    def gpu_memory_bytes(self) -> int:
        """Bytes on a GPU: what moves there, and what CUDA and its libraries take."""
        return int(CUDA_CONTEXT_BYTES + max(0.0, self.memory_bytes - WORKER_BYTES - self.host_bytes))


#: Writing or choosing a few numbers.
SMALL = Cost(0.0, WORKER_BYTES)


class Costs:
    """Costs of what the tasks of one recipe do with one model.

    Attributes
    ----------
    calls_per_sample
        Denoiser calls for one sample.
    recorded_steps
        Trajectory steps in the calibration set.
    recorded_per_seed
        Denoiser inputs in it, per seed.
    calibrated
        Denoiser inputs in the calibration set.
    model_bytes
        Of the weights in float32.
    read_bytes
        Of them that a task holds which only reads them: one layer's, and its copy, where they are left in their files.
    packed_bytes
        Of the packed weights, about.
    live_bytes
        What is alive at once in a forward, per sample.
    sample_bytes, image_bytes
        Of one sample in float32; of what a pipeline makes of it.
    around_bytes
        Of the weights of a pipeline's other components in float32, as far as tasks that sample hold them.
    layers, weights, elements
        Conv and Linear layers, their weights, and the elements of their inputs per sample.
    """

    def __init__(self, model: ModelInfo, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        whole = model.pipeline
        per_step = recipe.sampler.calls_per_step if whole is None else whole.rows_per_step(recipe.sampler)
        self.calls_per_sample = recipe.sampler.num_inference_steps * per_step
        self.recorded_steps = recipe.calibration.steps or recipe.sampler.num_inference_steps
        self.recorded_per_seed = self.recorded_steps * per_step
        self.calibrated = recipe.calibration.seeds * self.recorded_per_seed
        self.model_bytes = 4 * model.parameters
        self.layers = len(model.layers)
        self.weights = sum(unit.weights for unit in model.units)
        largest = max(layer.weights for layer in model.layers)
        self.read_bytes = 8 * largest + 4 * (model.parameters - self.weights) if model.streamed else self.model_bytes
        self.packed_bytes = int(self.weights * recipe.weights.bits / 8 * _GRIDS) if model.streamed else self.model_bytes
        widest = max(unit.input_bytes + unit.output_bytes for unit in model.units)
        self.live_bytes = min(model.activation_bytes, 6 * widest)
        self.sample_bytes = 4 * math.prod(model.sample_shape)
        self.image_bytes = self.sample_bytes if whole is None else whole.image_bytes
        self.around_bytes = 0 if whole is None else whole.other_bytes - (whole.text_bytes if whole.encodes else 0)
        self.elements = sum(unit.input_elements for unit in model.units)

    def sampling(self, seeds: int, batch: int, *, recorded: int = 0, decoded: bool = False) -> Cost:
        """Sampling with the full-precision model, of which some seeds' steps are kept."""
        kept = recorded * self.calls_per_sample * self.sample_bytes * 2
        work = self.forward(seeds * self.calls_per_sample, batch) + self.around(seeds, decoded=decoded)
        return Cost(work, self.memory(batch, kept + self.around_bytes, reads=True), kept)

    def around(self, seeds: int, *, decoded: bool) -> float:
        """What a whole pipeline does beside its denoiser: prompts encoded, latents decoded, GMAC."""
        whole = self.model.pipeline
        if whole is None:
            return 0.0
        encoding = 0.0 if whole.encodes else whole.encode_gmacs
        return seeds * (encoding + (whole.decode_gmacs if decoded else 0.0))

    def forward(self, samples: int, batch: int) -> float:
        """Full-precision denoiser calls on so many rows, GMAC."""
        return samples * self.model.gmacs + giga(-(-samples // batch) * self.layers * CALL)

    def quantized_forward(self, samples: int, batch: int) -> float:
        """Quantized denoiser calls on so many rows, GMAC."""
        calls = -(-samples // batch)
        unpacked = calls * self.weights * DEQUANTIZE + samples * self.elements * QUANTIZE
        return self.forward(samples, batch) + giga(unpacked)

    def replay(self, depth: float = 1.0) -> float:
        """Full-precision denoiser calls on the whole calibration set as far as a depth, GMAC."""
        return self.forward(self.calibrated, self.recipe.calibration.batch_size) * depth

    def hessian(self, layer: LayerInfo, config: RoundFit) -> float:
        """Second moments of one layer's input, and their factor, GMAC."""
        if config.method is not RoundingMethod.CLOSED_FORM:
            return 0.0
        seeds = min(config.samples, self.recipe.calibration.seeds)
        rows = seeds * self.recorded_per_seed * min(config.positions, layer.positions)
        return giga(rows * layer.columns**2 + 2 * layer.columns**3)

    def ranged(self, layer: LayerInfo, planned: PlannedLayer) -> float:
        """Range search of one layer's weight at one width, GMAC."""
        return giga(layer.weights * SEARCH) if planned.weight_range.method is RangeMethod.MSE else 0.0

    def codes(self, layer: LayerInfo, config: RoundFit) -> float:
        """Rounding of one layer on one grid, GMAC."""
        if config.method is not RoundingMethod.CLOSED_FORM:
            return 0.0
        return giga(layer.columns * (_COLUMN + layer.weights * _COLUMN_WEIGHT))

    def cached(self, needed: float) -> float:
        """Return the memory that a cache takes within the recipe's budget, bytes."""
        return min(needed, self.recipe.memory.budget_gib * GIB)

    def memory(self, batch: int, extra: float, *, reads: bool = False) -> int:
        """Return the memory of a worker that calls the denoiser on a batch, and holds `extra` bytes beside.

        `reads`: whether it only reads weights, so that large ones are left in their files.
        """
        held = self.read_bytes if reads else self.model_bytes
        return int(WORKER_BYTES + held + batch * self.live_bytes + extra)


def hessian_bytes(unit: UnitInfo, config: RoundFit) -> int:
    """Return the bytes of the second moments that rounding a unit accumulates."""
    return unit.hessian_bytes if config.method is RoundingMethod.CLOSED_FORM else 0


def giga(macs: float) -> float:
    """Return MACs as GMAC."""
    return macs / 1e9
