"""What a recipe may say: frozen records, every field with its default, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from orchestrator.recipes.formats import Activations, Attention, LayerException, Weights, activations_for, weights_for
from orchestrator.recipes.passes import Passes
from orchestrator.recipes.sections import Count, Positive, Section, Seed

#: Bits around which channels can have one more or one less.
ALLOCATED_BITS = (2, 3, 4, 5)


class Sampler(Section):
    """How samples are drawn: for calibration, for the references and for the evaluation alike."""

    scheduler: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$")] | None = Field(
        default=None,
        description="Scheduler class of diffusers that fits the model; null is the model's own, DDIM if that is DDPM.",
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


class Calibration(Section):
    """The denoiser inputs that ranges and roundings are fitted on, recorded from the sampler."""

    seeds: Count = 32
    first_seed: Seed = 1_000_000
    batch_size: Count = 32
    steps: Count | None = Field(default=None, description="Trajectory steps recorded, evenly spread; null is all.")
    shard_seeds: Count = Field(default=16, description="Seeds per task.")


class Memory(Section):
    """Bounds on memory."""

    budget_gib: Positive = Field(
        default=2.0, description="Activation cache of one task, GiB; what is more goes to disk."
    )


class Budget(Section):
    """What a release may cost at most; refused before anything runs if the recipe's bits do not fit."""

    weight_bits_mean: Annotated[float, Field(gt=0, le=32)] | None = Field(
        default=None,
        description="Mean bits of a weight of a Conv or Linear layer, scales and tables not counted; null is no limit.",
    )


class Evaluation(Section):
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


class Recipe(Section):
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
        if self.passes.scale is not None and self.activations.bits is None:
            raise ValueError("passes.scale: got activations.bits null, wanted quantized activations")
        self._check_shift()
        self._check_allocation()
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

    def _check_shift(self) -> None:
        """Refuse power-of-two steps that no layer would have."""
        scale = self.passes.scale
        if scale is None or scale.shift == "none":
            return
        if self.activations.is_dynamic:
            raise ValueError(
                f"passes.scale.shift: got {scale.shift} with activations {self.activations.mode}, wanted static or "
                "per_step ranges, or none"
            )
        if scale.shift == "skip" and not self.skip_split:
            raise ValueError("passes.scale.shift: got skip with skip_split false, wanted skip_split true, or variance")

    def _check_allocation(self) -> None:
        """Refuse bits per output channel where formats have no room for them."""
        weights, allocate = self.weights, self.passes.allocate
        if allocate is None or allocate.method == "uniform":
            return
        if weights.granularity != "per_channel" or weights.bits not in ALLOCATED_BITS:
            raise ValueError(
                f"passes.allocate: got weights of {weights.bits} bits {weights.granularity}, wanted "
                f"{', '.join(map(str, ALLOCATED_BITS))} bits per_channel"
            )
        if weights.symmetric and weights.bits == min(ALLOCATED_BITS):
            raise ValueError(
                f"passes.allocate: got symmetric weights of {weights.bits} bits, of which some channels would have 1, "
                "wanted weights.symmetric false"
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
        if self.passes.distill is not None:
            found.append(("passes.distill", self.passes.distill.first_seed, self.passes.distill.seeds))
        if step_bits is not None:
            found.append(("activations.step_bits", step_bits.first_seed, step_bits.seeds))
        return found
