"""What a recipe may say: frozen records, every field with its default, unknown keys refused.

A field that is added to a pass here reaches that pass's task bodies as a task parameter, without a change elsewhere.
Fields that cannot matter under the other choices of a pass are left out of its parameters, so that recipes that differ
only there share their tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from orchestrator.recipes.messages import first_problem

Bits = Literal[2, 3, 4, 5, 6, 8]
Granularity = Literal["per_tensor", "per_channel", "per_group"]
RangeMethod = Literal["minmax", "mse", "percentile"]
ActivationMode = Literal["static", "per_step", "dynamic_sample", "dynamic_token"]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Percentile = Annotated[float, Field(gt=0.5, le=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    """A mapping of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class _Partial(_Section):
    """A mapping that says only what differs: what was not stated is not there, and null is a value."""

    @model_serializer(mode="wrap")
    def _only_stated(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


class Sampler(_Section):
    """How samples are drawn: for calibration, for the references and for the evaluation alike."""

    scheduler: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$")] | None = Field(
        default=None, description="Scheduler class of diffusers; null takes the model's own."
    )
    num_inference_steps: Count = 20
    eta: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Share of DDPM's noise in DDIM-like schedulers."
    )
    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Classifier-free guidance; 1 is none."
    )
    null_class: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description='Label that means "no class", if it is not the embedding\'s extra row.'
    )
    timestep_scale: Positive = Field(
        default=1.0, description="What the denoiser gets per unit of the scheduler's timestep."
    )
    mu: float | None = Field(
        default=None, description="Resolution shift of schedulers that take one; null computes it."
    )
    options: dict[str, Any] = Field(default={}, description="Overrides of the scheduler's config.")

    @property
    def calls_per_step(self) -> int:
        """How often the denoiser is called for one step of one sample."""
        return 1 if self.guidance_scale == 1.0 else 2


class Calibration(_Section):
    """The denoiser inputs that ranges and roundings are fitted on, recorded from the sampler."""

    seeds: Count = 32
    first_seed: Seed = 1_000_000
    batch_size: Count = 32
    steps: Count | None = Field(default=None, description="Trajectory steps recorded, evenly spread; null is all.")
    shard_seeds: Count = Field(default=16, description="Seeds per task.")


class Weights(_Section):
    """Format of the weights."""

    bits: Bits = 8
    symmetric: bool = False
    granularity: Granularity = "per_channel"
    group_size: Count | None = Field(default=None, description="Input channels per scale; only for per_group.")
    range: RangeMethod = "minmax"
    percentile: Percentile = Field(default=0.9999, description="Share of values inside the range; only for percentile.")

    @model_validator(mode="after")
    def _has_group_size(self) -> Self:
        if (self.granularity == "per_group") != (self.group_size is not None):
            got = "null" if self.group_size is None else self.group_size
            wanted = "a size" if self.group_size is None else "null"
            raise ValueError(f"group_size: got {got} with granularity {self.granularity}, wanted {wanted}")
        return self


class StepBits(_Section):
    """Activation bits chosen for each trajectory step, in place of one number for all."""

    choices: Annotated[list[Bits], Field(min_length=2)] = [4, 6, 8]
    method: Literal["joint", "effect", "snr", "early_low", "late_low"] = Field(
        default="joint",
        description="By the error of the final samples (joint counts that errors of steps add up, effect does not), by "
        "the signal-to-noise ratio of the prediction (PTQD), or simply in order.",
    )
    target_mean: Annotated[float, Field(ge=2, le=8)] = Field(
        default=6.0, description="Mean bits over the steps, at most."
    )
    threshold: Positive | None = Field(
        default=None,
        description="For snr, in place of target_mean: least ratio of the prediction's SNR to the noise schedule's.",
    )
    seeds: Count = Field(default=16, description="Seeds that effects are measured on.")
    first_seed: Seed = 3_000_000
    shard_seeds: Count = Field(default=8, description="Seeds per task.")

    @model_validator(mode="after")
    def _is_solvable(self) -> Self:
        if len(set(self.choices)) != len(self.choices) or self.choices != sorted(self.choices):
            raise ValueError(f"choices: got {self.choices}, wanted different bits in rising order")
        if self.threshold is not None and self.method != "snr":
            raise ValueError(f"threshold: got {self.threshold} with method {self.method}, wanted null")
        if self.target_mean < self.choices[0]:
            raise ValueError(f"target_mean: got {self.target_mean:g}, wanted at least {self.choices[0]}")
        return self

    def parameters(self) -> dict[str, Any]:
        """Return what decides the choice among measured effects."""
        limit = {"target_mean": self.target_mean} if self.threshold is None else {"threshold": self.threshold}
        return {"method": self.method, **limit}


class Activations(_Section):
    """Format of the layers' inputs; `bits` null keeps all of them, and attention, in full precision."""

    bits: Bits | None = None
    symmetric: bool = False
    mode: ActivationMode = "per_step"
    range: RangeMethod = "minmax"
    percentile: Percentile = Field(default=0.9999, description="Share of values inside the range; only for percentile.")
    step_bits: StepBits | None = Field(
        default=None,
        description="Bits for each trajectory step, in place of `bits`, where no exception says other bits.",
    )
    unknown_timestep: Literal["error", "nearest"] = Field(
        default="error",
        description="At a timestep that was not calibrated for; nearest takes the nearest step, with a warning.",
    )

    @property
    def is_dynamic(self) -> bool:
        """Whether ranges are taken at run time."""
        return self.mode.startswith("dynamic")


class Attention(_Section):
    """The matmuls of attention: query, key and value at `bits`, probabilities at `softmax_bits`."""

    enabled: bool = True
    bits: Bits = 8
    softmax_bits: Bits = 8


class WeightsException(_Partial):
    """What differs from `weights` in some layers."""

    bits: Bits | None = None
    symmetric: bool | None = None
    granularity: Granularity | None = None
    group_size: Count | None = None
    range: RangeMethod | None = None
    percentile: Percentile | None = None


class ActivationsException(_Partial):
    """What differs from `activations` in some layers; `bits: null` keeps their inputs in full precision."""

    bits: Bits | None = None
    symmetric: bool | None = None
    mode: ActivationMode | None = None
    range: RangeMethod | None = None
    percentile: Percentile | None = None


class LayerException(_Section):
    """Layers that are treated differently; of several entries that match a layer, later ones win."""

    match: Annotated[str, Field(pattern=r"^(@first|@last|[^@].*)$")] = Field(
        description="Glob over layer and attention names, or @first or @last."
    )
    weights: WeightsException = WeightsException()
    activations: ActivationsException = ActivationsException()
    keep: bool = Field(default=False, description="Keep in full precision.")
    required: bool = Field(default=True, description="Whether it is an error if a model has no such layer.")


class _Pass(_Section):
    """A step of the method. `parameters` is what its task bodies are told."""

    #: (field, value) -> the fields that matter only if the field has that value
    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {}

    def parameters(self) -> dict[str, Any]:
        """Return the fields that decide the result, as JSON."""
        fields = self.model_dump(mode="json")
        idle = {name for (key, value), names in self._only_if.items() if fields[key] != value for name in names}
        return {name: value for name, value in fields.items() if name not in idle}


class Round(_Pass):
    """Fix weight grids, round the weights, measure activation ranges."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("method", "closed_form"): frozenset({"samples", "positions", "damping"}),
    }

    method: Literal["nearest", "closed_form"] = "nearest"
    inputs: Literal["fp"] = "fp"
    samples: Count = Field(default=32, description="Calibration seeds that the Hessian is taken over, at most.")
    positions: Count = Field(
        default=16, description="Output positions per sample that the Hessian is taken over, at most."
    )
    damping: Annotated[float, Field(ge=0)] = Field(
        default=0.03, description="Share of the mean diagonal added to the Hessian."
    )


class Temporal(_Pass):
    """Quantize the temporal information block as a unit of its own, over all timesteps of the sampler (TFMQ-DM)."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("method", "reconstruct"): frozenset({"iterations", "lr", "trust", "rounding_weight", "warmup", "beta"}),
        ("cache", True): frozenset({"cache_ratio"}),
    }

    method: Literal["nearest", "closed_form", "reconstruct"] = Field(
        default="reconstruct", description="Rounding of its weights; reconstruct learns it for the features alone."
    )
    finite_set: bool = Field(
        default=True, description="Its activations have a range per trajectory step, whatever activations.mode is."
    )
    cache: bool = Field(default=False, description="Look features up in tables instead of computing them.")
    cache_ratio: Positive = Field(
        default=2.0, description="Bytes that tables may take, per byte of the layers that they replace."
    )
    damping: Annotated[float, Field(ge=0)] = Field(
        default=0.001, description="Share of the mean diagonal added to the Hessian."
    )
    iterations: Count = 300
    lr: Positive = 2e-2
    trust: Share = Field(default=0.9, description="As in reconstruct; closed form over the whole finite set is close.")
    rounding_weight: Annotated[float, Field(ge=0)] = 100.0
    warmup: Share = 0.0
    beta: tuple[Positive, Positive] = (4.0, 2.0)

    def parameters(self) -> dict[str, Any]:
        """Return the fields that decide the result; `finite_set` is in the layers' formats."""
        return {name: value for name, value in super().parameters().items() if name != "finite_set"}


class Reconstruct(_Pass):
    """Learn the rounding of each unit so that its output stays what it was (AdaRound)."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("learn_activation_scales", True): frozenset({"activation_lr"})
    }

    inputs: Literal["fp", "quantized"] = Field(
        default="fp",
        description="Unit inputs: from the full-precision model (all units at once) or the quantized one (in order).",
    )
    start: Literal["nearest", "round"] = Field(
        default="nearest", description="Codes to start from: nearest, or those of round."
    )
    iterations: Count = 200
    batch_size: Count = 32
    lr: Positive = 1e-2
    trust: Share = Field(
        default=0.5, description="How far the start leans to the given code: 0, AdaRound's own start, to 1."
    )
    learn_activation_scales: bool = False
    activation_lr: Positive = 4e-4
    rounding_weight: Annotated[float, Field(ge=0)] = Field(
        default=100.0, description="Weight of the rounding regulariser, against a loss of 1 at the start."
    )
    warmup: Share = Field(default=0.0, description="Share of the iterations without the rounding regulariser.")
    beta: tuple[Positive, Positive] = Field(default=(4.0, 2.0), description="Sharpness of the regulariser: start, end.")

    @model_validator(mode="after")
    def _beta_falls(self) -> Self:
        if self.beta[0] < self.beta[1]:
            raise ValueError(f"beta: got {list(self.beta)}, wanted a start that is not below the end")
        return self


class Correct(_Pass):
    """Correct the noise that quantization adds to the predictions, in the sampler (PTQD)."""

    scale: bool = Field(default=True, description="Divide by 1 + k, the part of the noise that follows the prediction.")
    bias: bool = Field(default=True, description="Subtract each channel's mean.")
    variance: bool = Field(default=True, description="Take what remains out of the noise that the sampler adds.")
    least_r2: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Share of the noise's variance that the prediction must explain for scale to be used."
    )
    held_out: bool = Field(default=True, description="Use scale and bias only at steps where held-out seeds gain.")
    seeds: Count = Field(default=64, description="Trajectories that the correction is fitted on.")
    held_out_seeds: Count = Field(default=32, description="Trajectories after these, that decide what is used.")
    first_seed: Seed = 2_000_000
    shard_seeds: Count = Field(default=16, description="Seeds per task.")
    batch_size: Count = Field(default=32, description="Seeds per denoiser call.")
    unknown_timestep: Literal["error", "nearest"] = Field(
        default="error", description="What the sampler does on another trajectory."
    )

    def parameters(self) -> dict[str, Any]:
        """Return what decides the correction, given the statistics."""
        own = {"seeds", "held_out_seeds", "first_seed", "shard_seeds", "batch_size"}
        return self.model_dump(mode="json", exclude=own)


class Passes(_Section):
    """The steps of the method, in the planner's order."""

    temporal: Temporal | None = None
    round: Round = Round()
    reconstruct: Reconstruct | None = None
    correct: Correct | None = None


class Memory(_Section):
    """Bounds on memory."""

    budget_gib: Positive = Field(
        default=2.0, description="Activation cache of one task, GiB; what is more goes to disk."
    )


class Budget(_Section):
    """What a release may cost at most; refused before anything runs if the recipe's bits do not fit."""

    weight_bits_mean: Annotated[float, Field(gt=0, le=32)] | None = Field(
        default=None,
        description="Mean bits of a weight of a Conv or Linear layer, scales and tables not counted; null is no limit.",
    )


class Evaluation(_Section):
    """How the packed model is compared with the original, on seeds that calibration did not see."""

    seeds: Annotated[int, Field(ge=2)] = 256
    first_seed: Seed = 0
    batch_size: Count = 32
    shard_seeds: Count = Field(default=64, description="Seeds per task.")
    sqnr_seeds: Count = Field(default=32, description="Seeds that the per-step SQNR is taken over, at most.")
    extractor: Literal["efficientnet-lite0", "inception-v3"] = "efficientnet-lite0"
    extractor_weights: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="File with the extractor's weights (resolved: its SHA-256); inception-v3 needs one."
    )
    grid: Count = Field(default=16, description="Images in the sample grid, at most.")

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        needs = self.extractor == "inception-v3"
        if needs != (self.extractor_weights is not None):
            got = "a file" if self.extractor_weights else "null"
            wanted = "a file" if needs else "null (its weights come with its package)"
            raise ValueError(f"extractor_weights: got {got} with extractor {self.extractor}, wanted {wanted}")
        return self


class Recipe(_Section):
    """A whole recipe, with every field set."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")] = "recipe"
    description: str = ""
    sampler: Sampler = Sampler()
    calibration: Calibration = Calibration()
    weights: Weights = Weights()
    activations: Activations = Activations()
    attention: Attention = Attention()
    skip_split: bool = Field(
        default=True, description="Split layers that read a concatenation, each part with its own range."
    )
    layers: tuple[LayerException, ...] = ()
    passes: Passes = Passes()
    memory: Memory = Memory()
    budget: Budget = Budget()
    evaluation: Evaluation = Evaluation()
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self._check_seeds()
        self._check_finite_set()
        steps, recorded = self.sampler.num_inference_steps, self.calibration.steps
        if recorded is not None and recorded > steps:
            raise ValueError(f"calibration.steps: got {recorded}, wanted at most the sampler's {steps}")
        chosen = self.activations
        if chosen.step_bits is not None and (chosen.bits is None or chosen.mode != "per_step"):
            raise ValueError(
                f"activations.step_bits: got a mapping with bits {chosen.bits or 'null'}, mode {chosen.mode}, "
                "wanted bits and mode per_step"
            )
        for place, entry in enumerate(self.layers):
            weights_for(self.weights, [entry], f"layers.{place}.weights")
            activations_for(self.activations, [entry], f"layers.{place}.activations")
        per_step = [self.activations, *(activations_for(self.activations, [entry], "") for entry in self.layers)]
        if recorded not in (None, steps) and any(a.bits and a.mode == "per_step" for a in per_step):
            raise ValueError(
                f"calibration.steps: got {recorded} with activations per_step, wanted null (each of the {steps} steps)"
            )
        return self

    def _check_finite_set(self) -> None:
        """Refuse a temporal pass over some of the sampler's steps."""
        recorded = self.calibration.steps
        if self.passes.temporal is not None and recorded not in (None, self.sampler.num_inference_steps):
            raise ValueError(
                f"calibration.steps: got {recorded} with passes.temporal, wanted null (each of the sampler's steps)"
            )

    def _check_seeds(self) -> None:
        """Refuse an evaluation on what the model was fitted to."""
        held_out = self.evaluation
        end = held_out.first_seed + held_out.seeds
        for name, first, count in self._fitted_seeds():
            if first < end and held_out.first_seed < first + count:
                raise ValueError(
                    f"evaluation.first_seed: got seeds {held_out.first_seed}..{end - 1}, wanted none of {name}'s "
                    f"{first}..{first + count - 1}"
                )

    def _fitted_seeds(self) -> list[tuple[str, int, int]]:
        """Return (section, first seed, count) of all that something is fitted to."""
        found = [("calibration", self.calibration.first_seed, self.calibration.seeds)]
        correct, step_bits = self.passes.correct, self.activations.step_bits
        if correct is not None:
            found.append(("passes.correct", correct.first_seed, correct.seeds + correct.held_out_seeds))
        if step_bits is not None:
            found.append(("activations.step_bits", step_bits.first_seed, step_bits.seeds))
        return found


def weights_for(weights: Weights, entries: list[LayerException], path: str = "weights") -> Weights:
    """Return the weight format after the exceptions that match, in order; ValueError names `path`."""
    return _merged(weights, [entry.weights for entry in entries], path)


def activations_for(activations: Activations, entries: list[LayerException], path: str = "activations") -> Activations:
    """Return the activation format after the exceptions that match, in order; ValueError names `path`.

    A recipe that quantizes weights only has no exceptions from that.
    """
    if activations.bits is None:
        return activations
    return _merged(activations, [entry.activations for entry in entries], path)


_S = TypeVar("_S", bound=_Section)


def _merged(section: _S, partials: list[Any], path: str) -> _S:
    """Lay partial sections over a whole one."""
    values = section.model_dump()
    for partial in partials:
        values |= partial.model_dump()
    try:
        return type(section).model_validate(values)
    except ValidationError as error:
        raise ValueError(first_problem(error, type(section), path)) from None
