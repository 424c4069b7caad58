"""The passes of a recipe: one record each, with every field's default.

A field that is added to a pass here reaches that pass's task bodies as a task parameter, without a change elsewhere.
Fields that cannot matter under the other choices of a pass are left out of its parameters, so that recipes that differ
only there share their tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.recipes.sections import Count, Positive, Section, Seed, Share


class Pass(Section):
    """A step of the method. `parameters` is what its task bodies are told."""

    #: (field, value) -> the fields that matter only if the field has that value
    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {}

    def parameters(self) -> dict[str, Any]:
        """Return the fields that decide the result, as JSON."""
        fields = self.model_dump(mode="json")
        idle = {name for (key, value), names in self._only_if.items() if fields[key] != value for name in names}
        return {name: value for name, value in fields.items() if name not in idle}


class Round(Pass):
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


class Scale(Pass):
    """Choose what input channels are divided by and weights multiplied with (DMQ), before rounding."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("method", "learned"): frozenset({"iterations", "lr", "weighting", "positions", "held_out"}),
        ("method", "smooth"): frozenset({"exponent"}),
        ("weighting", "adaptive"): frozenset({"alpha", "xi"}),
        ("weighting", "early"): frozenset({"half_life"}),
        ("shift", "variance"): frozenset({"least_spread"}),
    }

    method: Literal["learned", "smooth", "none"] = Field(
        default="learned",
        description="Learned for the expected error of each layer's output, SmoothQuant's closed form, or no scales.",
    )
    exponent: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="Of the activations' range, for smooth; the weights' has 1 less that."
    )
    iterations: Count = 200
    lr: Positive = 2e-2
    weighting: Literal["adaptive", "early", "uniform"] = Field(
        default="adaptive",
        description="How errors of trajectory steps add up: adaptive favours those of small error, early the noisiest.",
    )
    alpha: Positive = Field(default=20.0, description="Exponent of the adaptive weights.")
    xi: Share = Field(default=0.95, description="Momentum of the errors that adaptive weights are made from.")
    half_life: Positive = Field(
        default=0.05, description="For early: share of the trajectory after which a step counts half."
    )
    samples: Count = Field(
        default=32,
        description="Calibration seeds that second moments are taken over, and that vote on shifts, at most.",
    )
    positions: Count = Field(default=16, description="Output positions per sample of the same, at most.")
    shift: Literal["none", "skip", "variance"] = Field(
        default="none",
        description="Layers with power-of-two steps for each channel: those that read a concatenation (skip_split), "
        "or whose channels' ranges differ much.",
    )
    consensus: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.85, description="Share of the samples that must agree on a channel's power of two."
    )
    least_spread: Positive = Field(
        default=0.5, description="For variance: least standard deviation of channels' ranges, over their mean."
    )
    held_out: Share = Field(
        default=0.0,
        description="Share of the calibration seeds that scales are learned without, so that ranges, measured on all, "
        "have room for what is new.",
    )

    def parameters(self) -> dict[str, Any]:
        """Return the fields that decide the result; `held_out` only if it is used."""
        fields = super().parameters()
        if not self.held_out:
            fields.pop("held_out", None)
        if self.method != "learned":
            fields = {name: value for name, value in fields.items() if name not in ("alpha", "xi", "half_life")}
        return {name: value for name, value in fields.items() if name != "consensus" or self.shift != "none"}

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.method == "none" and self.shift == "none":
            raise ValueError("method: got none with shift none, wanted one of them to do something")
        return self


class Temporal(Pass):
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


class Reconstruct(Pass):
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


class Allocate(Pass):
    """Give each output channel its own weight bits around `weights.bits` (MPQ-DM), where no exception says others."""

    method: Literal["uniform", "kurtosis", "global"] = Field(
        default="kurtosis",
        description="kurtosis: in each layer as many channels up as down, heavy tails first; global: over all layers, "
        "the same bits in all; uniform: none.",
    )
    extra: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="Bits per weight above weights.bits, at most: channels that go up alone."
    )
    samples: Count = Field(default=8, description="Calibration seeds that errors are measured on, at most.")
    positions: Count = Field(default=16, description="Output positions per sample, at most.")

    @model_validator(mode="after")
    def _has_use(self) -> Self:
        if self.method == "uniform" and self.extra:
            raise ValueError(f"extra: got {self.extra:g} with method uniform, wanted 0")
        return self

    def measurement(self) -> dict[str, Any]:
        """Return what decides the errors that are measured."""
        return self.model_dump(mode="json", include={"samples", "positions"})

    def parameters(self) -> dict[str, Any]:
        """Return what decides the choice, given the errors."""
        return self.model_dump(mode="json", include={"method", "extra"})


class Distill(Pass):
    """Tune weights (low rank, merged before they are quantized), grids and activation steps, end to end (MPQ-DM)."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("relations", True): frozenset({"relation_weight", "positions"})
    }

    iterations: Count = 1200
    batch_size: Annotated[int, Field(ge=2)] = Field(
        default=8, description="Samples per iteration, in pairs of consecutive steps."
    )
    rank: Count = 32
    lr: Positive = Field(default=1e-2, description="Rate of the low-rank factors, per mean step of the layer.")
    weight_lr: Positive = Field(default=1e-3, description="Rate of the weights' step sizes, as logarithms.")
    activation_lr: Positive = Field(default=2e-3, description="Rate of the activations' step sizes, as logarithms.")
    zero_point_lr: Positive = Field(default=2e-3, description="Rate of all zero points, in codes.")
    bias_lr: Positive = 3e-4
    relations: bool = Field(default=True, description="Distil time-smoothed relations too, not predictions alone.")
    relation_weight: Positive = 100.0
    positions: Count = Field(
        default=256, description="Positions of the feature that are related, drawn if it has more."
    )
    seeds: Count = Field(default=64, description="Full-precision trajectories that are distilled from.")
    first_seed: Seed = 4_000_000
    shard_seeds: Count = Field(default=16, description="Seeds per task.")

    def parameters(self) -> dict[str, Any]:
        """Return what decides the result, given the trajectories."""
        return {n: v for n, v in super().parameters().items() if n not in ("seeds", "first_seed", "shard_seeds")}


class Correct(Pass):
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


class Passes(Section):
    """The steps of the method, in the planner's order."""

    temporal: Temporal | None = None
    scale: Scale | None = None
    allocate: Allocate | None = None
    round: Round = Round()
    reconstruct: Reconstruct | None = None
    distill: Distill | None = None
    correct: Correct | None = None
