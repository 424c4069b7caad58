"""How samples are drawn: for calibration, for references and for the evaluation alike."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from quant_spec.record import Grown, Positive


class Sampler(Grown):
    """How samples are drawn: for calibration, for the references and for the evaluation alike."""

    scheduler: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$", max_length=128)] | None = Field(
        default=None,
        description="Scheduler class of diffusers that fits the model; null is the model's own, DDIM if that is DDPM.",
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=20, description="Steps of a trajectory."
    )
    eta: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Share of DDPM's noise in DDIM-like schedulers."
    )
    guidance_scale: Annotated[float, Field(ge=0, le=10_000)] | None = Field(
        default=None,
        description="Classifier-free guidance; 1 is none and calls the denoiser once per step, anything else twice; "
        "null is a pipeline's own default, and 1 for a bare denoiser.",
    )
    null_class: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        default=None, description='Label that means "no class", if it is not the embedding\'s extra row.'
    )
    timestep_scale: Positive = Field(
        default=1.0, description="What the denoiser gets per unit of the scheduler's timestep."
    )
    mu: Annotated[float, Field(ge=-1e6, le=1e6)] | None = Field(
        default=None, description="Resolution shift of schedulers that take one; null computes it."
    )
    options: Annotated[dict[str, Any], Field(max_length=100)] = Field(
        default={}, description="Overrides of the scheduler's config, such as timestep_spacing."
    )

    arguments: Annotated[dict[str, Any], Field(max_length=100)] = Field(
        default={},
        description="Further keyword arguments of a pipeline's call, such as height, width or max_sequence_length.",
    )

    _omitted: ClassVar[frozenset[str]] = frozenset({"arguments"})
    _later: ClassVar[frozenset[str]] = frozenset({"arguments"})

    @property
    def is_guided(self) -> bool:
        """Whether each step calls the denoiser with and without the condition."""
        return self.guidance_scale not in (None, 1.0)

    @property
    def calls_per_step(self) -> int:
        """How often the denoiser is called for one step of one sample."""
        return 2 if self.is_guided else 1
