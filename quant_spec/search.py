"""What a search may say: which models, which choices of bits, what a model may cost, and how much is tried.

A search gives each of its models a Pareto set of bit allocations, each packed, loaded and measured. Its file is YAML,
with these records' fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from quant_spec.enums import Objective, SearchUnit
from quant_spec.numbers import human_bytes, human_count
from quant_spec.record import Bits, Count, Record, Seed

#: Name of the base recipe as it is, among the variants.
BASE_VARIANT = "base"

_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES_TEXT = re.compile(r"\s*(?P<number>\d{1,15}(?:\.\d{1,15})?)\s*(?P<unit>|B|kB|MB|GB|KiB|MiB|GiB)\s*")
_MOST_BYTES = 2**50


def _parse_bytes(value: Any) -> Any:
    """Return the bytes that a text such as 2.8MB means; anything else is left as it is."""
    if not isinstance(value, str):
        return value
    found = _BYTES_TEXT.fullmatch(value)
    if found is None:
        raise PydanticCustomError("bytes_text", "bytes")
    return round(float(found["number"]) * _UNITS[found["unit"]])


Bytes = Annotated[
    int,
    Field(ge=1, le=_MOST_BYTES),
    BeforeValidator(_parse_bytes),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": _MOST_BYTES},
                {"type": "string", "pattern": r"^[0-9.]+ ?(B|kB|MB|GB|KiB|MiB|GiB)$"},
            ]
        }
    ),
]
#: A glob, a name or a path.
Pattern = Annotated[str, Field(min_length=1, max_length=4096)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Space(Record):
    """The choices that a search makes, layer by layer, and for the whole model."""

    weight_bits: Annotated[tuple[Bits, ...], Field(min_length=1, max_length=6)] = Field(
        default=(2, 3, 4, 5, 6, 8), description="Widths that a layer's weights may have."
    )
    per: SearchUnit = Field(
        default=SearchUnit.LAYER,
        description="What gets its own weight bits: each layer, each unit (all its layers alike), or also half of a "
        "layer's output channels (channels), those that gain most, at the next width of weight_bits.",
    )
    keep: bool = Field(default=False, description="Whether a layer may also stay in full precision.")
    activation_bits: Annotated[tuple[Bits, ...], Field(max_length=6)] = Field(
        default=(), description="Widths that a layer's inputs may have; an empty list leaves them to the base recipe."
    )
    step_ranges: Annotated[int, Field(ge=1, le=100)] = Field(
        default=1,
        description="Ranges of trajectory steps, of equal length, each with activation bits of its own; 1 is one "
        "width for all steps.",
    )
    fixed: Annotated[tuple[Pattern, ...], Field(max_length=1000)] = Field(
        default=(),
        description="Globs over the names of layers and attentions that stay as the base recipe says; @first and @last "
        "as in a recipe's layers.",
    )
    variants: Annotated[dict[Name, dict[str, Any]], Field(max_length=32)] = Field(
        default={},
        description="Other recipes that a point may start from: a name, and assignments on the base recipe (a.b: "
        "value), such as a pass that is off (null) or on. The base recipe as it is has the name base.",
    )

    @model_validator(mode="after")
    def _has_choices(self) -> Self:
        for name in ("weight_bits", "activation_bits"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name}: got {list(values)}, wanted different widths, rising")
        if BASE_VARIANT in self.variants:
            raise ValueError(f"variants: got the name {BASE_VARIANT}, wanted others (the base recipe has it)")
        if self.step_ranges > 1 and not self.activation_bits:
            raise ValueError(
                f"step_ranges: got {self.step_ranges} without activation_bits, wanted 1, or widths to choose from"
            )
        if len(self.weight_bits) < 2 and len(self.activation_bits) < 2 and not (self.keep or self.variants):
            raise ValueError(
                f"weight_bits: got {list(self.weight_bits)}, keep false and no other choice, wanted at least two "
                "choices of something"
            )
        return self

    def variant_names(self) -> tuple[str, ...]:
        """Return the names of all recipes that a point may start from, the base recipe first."""
        return (BASE_VARIANT, *self.variants)


class SearchBudget(Record):
    """What a model may cost at most; of several limits each holds."""

    weight_bits_mean: Annotated[float, Field(gt=0, le=32)] | None = Field(
        default=None, description="Mean bits of a weight, over all Conv and Linear layers."
    )
    bytes: Bytes | None = Field(
        default=None, description="Bytes of the packed file, with everything in it: a number, or text such as 2.8MB."
    )
    bops: Annotated[float, Field(gt=0, le=1e30)] | None = Field(
        default=None, description="Bit operations of one prediction: multiply-adds x weight bits x activation bits."
    )
    latency_ms: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None, description="Milliseconds of one prediction, by latency_table."
    )
    memory_bytes: Bytes | None = Field(
        default=None, description="Bytes of memory at the peak of a prediction: weights and the largest activations."
    )

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if not self.limits():
            raise ValueError(f"weight_bits_mean: got a budget without a limit, wanted one of {', '.join(LIMITS)}")
        return self

    def limits(self) -> dict[str, float]:
        """Return the limits that there are, by name."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    def text(self) -> str:
        """Return the limits for people, such as `at most 2.8 MB, 4 bits`."""
        return "at most " + ", ".join(_LIMIT_TEXTS[name](value) for name, value in self.limits().items())


#: The names of a budget's limits.
LIMITS = tuple(SearchBudget.model_fields)
_LIMIT_TEXTS = {
    "weight_bits_mean": lambda value: f"{value:g} bits",
    "bytes": human_bytes,
    "bops": lambda value: f"{human_count(value)} BOPs",
    "latency_ms": lambda value: f"{value:g} ms",
    "memory_bytes": lambda value: f"{human_bytes(value)} of memory",
}


def unmet_text(name: str, got: float, smallest: float | None, largest: float | None, path: str) -> str:
    """Return why a limit cannot be met: below the smallest that any choice reaches, or above the largest.

    Parameters
    ----------
    name
        Of the limit, one of `LIMITS`.
    smallest, largest
        What the choices reach of it; None where limits contradict each other.
    path
        Where the limit stands, such as `budgets.0`.
    """

    def shown(value: float) -> str:
        return human_bytes(value) if name.endswith("bytes") else f"{value:g}"

    told = f"{path}.{name}: got {shown(got)}, wanted"
    if smallest is None or largest is None:
        return f"{told} a limit that some choice meets together with the others"
    return f"{told} {shown(smallest)} to {shown(largest)}, which is what the choices reach"


class Screening(Record):
    """How candidates are measured before the best are measured in full."""

    seeds: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=16,
        description="Samples that are compared with full precision, seed by seed; 0 screens none, so that predictions "
        "alone choose what is measured in full (only for objective prediction_error).",
    )
    first_seed: Seed = Field(
        default=2_000_000, description="First of their seeds; they must not overlap calibration's or evaluation's."
    )
    batch_size: Count = Field(default=16, description="Seeds per denoiser call.")


class Effort(Record):
    """How much is tried for each model; whichever ends first ends the screening."""

    rounds: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=2, description="Rounds of candidates, each proposed from what the earlier ones measured."
    )
    candidates: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=8, description="Candidates of a round that are packed and measured."
    )
    tasks: Count | None = Field(
        default=None,
        description="Tasks that a model's candidates may add; null is no limit. The final stage always runs.",
    )
    seconds: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None,
        description="Task-seconds that may be spent on a model before its final stage; null is no limit.",
    )


class SearchSpec(Record):
    """A whole search, with every field set."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] = Field(
        default="search",
        description="Names the search and, together with the model's, its releases; by default that of the file.",
    )
    description: Annotated[str, Field(max_length=10_000)] = Field(
        default="", description="What the search is, in one line."
    )
    models: Annotated[tuple[Pattern, ...], Field(min_length=1, max_length=10_000)] = Field(
        description="Names of registered models, folders, globs of either, or hf:owner/name[@revision]."
    )
    recipe: Pattern = Field(
        default="fast-w4a8", description="Base recipe: a shipped one's name, or a file relative to this one."
    )
    set: dict[str, Any] = Field(default={}, description="Assignments on the base recipe, such as evaluation.seeds: 64.")
    space: Space = Field(default=Space(), description="The choices.")
    budgets: Annotated[tuple[SearchBudget, ...], Field(max_length=100)] = Field(
        default=(), description="What a model may cost, several at once; an empty list is a sweep over all sizes."
    )
    objective: Objective = Field(
        default=Objective.PSNR_DB,
        description="What is best: same-seed PSNR, the error of the predictions along the trajectory, or the Fréchet "
        "distance to full precision.",
    )
    screening: Screening = Field(default=Screening(), description="How candidates are measured at first.")
    effort: Effort = Field(default=Effort(), description="How much is tried for each model.")
    points: Annotated[int, Field(ge=1, le=100)] = Field(
        default=8, description="Points of each model's front that are measured with the recipe's whole evaluation."
    )
    publish: Annotated[int, Field(ge=0, le=100)] = Field(
        default=3, description="How many of those become releases; the best within each budget come first."
    )
    baselines: bool = Field(
        default=True,
        description="Whether uniform widths and the methods' own allocations are measured beside the front.",
    )
    warm_start: bool | Annotated[str, Field(min_length=1, max_length=64)] = Field(
        default=True,
        description="Start from the front of a model of the same architecture: true for any that was searched before, "
        "or a search's id or name.",
    )
    latency_table: Pattern | None = Field(
        default=None, description="File that bench --layers wrote; needed by limits of latency_ms."
    )
    latency_device: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="Device that latencies are of, as bench names it; a table of another is refused."
    )
    seed: Seed = Field(default=0, description="Of every random choice of the search.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.publish > self.points:
            raise ValueError(f"publish: got {self.publish} with points {self.points}, wanted at most as many")
        if self.screening.seeds == 0 and self.objective is not Objective.PREDICTION_ERROR:
            raise ValueError(
                f"screening.seeds: got 0 with objective {self.objective}, which is measured on samples, wanted at "
                f"least 2, or objective {Objective.PREDICTION_ERROR}"
            )
        if self.screening.seeds == 1:
            raise ValueError("screening.seeds: got 1, wanted 0, or at least 2")
        for place, budget in enumerate(self.budgets):
            if budget.latency_ms is not None and self.latency_table is None:
                raise ValueError(
                    f"budgets.{place}.latency_ms: got {budget.latency_ms:g} without latency_table, wanted a file that "
                    "bench --layers wrote"
                )
        return self

    def assignments(self, variant: str = BASE_VARIANT) -> Iterator[tuple[str, Any]]:
        """Return what a variant assigns on the base recipe, in order."""
        yield from self.set.items()
        if variant != BASE_VARIANT:
            yield from self.space.variants[variant].items()
