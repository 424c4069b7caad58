"""What a recipe may say: frozen records, every field with its default, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from quant_spec.components import ComponentRecipe, is_denoiser
from quant_spec.enums import (
    ActivationMode,
    Extractor,
    NumberType,
    Shift,
    ShownSeeds,
    TemporalRounding,
    UnitInputs,
    WeightCodes,
)
from quant_spec.formats import EXACT_SOFTMAX_BITS
from quant_spec.passes.allocate import ALLOCATED_BITS, Allocate
from quant_spec.passes.choose import GAIN_SEEDS, Choose
from quant_spec.passes.correct import Correct
from quant_spec.passes.differences import Differences
from quant_spec.passes.distill import Distill
from quant_spec.passes.exceptions import Exceptions
from quant_spec.passes.low_rank import LowRank
from quant_spec.passes.menu import Menu
from quant_spec.passes.reconstruct import Reconstruct
from quant_spec.passes.round import Round
from quant_spec.passes.scale import Scale
from quant_spec.passes.temporal import Temporal
from quant_spec.recipe_formats import (
    Activations,
    Attention,
    LayerException,
    Weights,
    activations_for,
    exact_name,
    weights_for,
)
from quant_spec.record import Count, Grown, Record, Seed
from quant_spec.resources import JobResources
from quant_spec.sampler import Sampler

#: Tasks that the seeds of one section may be shared out among.
MOST_SHARDS = 10_000


class Passes(Grown):
    """The steps of the method, in the planner's order."""

    _later: ClassVar[frozenset[str]] = frozenset({"low_rank", "menu", "choose", "differences", "exceptions"})

    temporal: Temporal | None = Field(
        default=None,
        description="The layers that compute features of the timestep, as a unit of their own; null leaves them in "
        "their units.",
    )
    scale: Scale | None = Field(
        default=None, description="Input channels divided, and weights multiplied, before rounding; null scales none."
    )
    low_rank: LowRank | None = Field(
        default=None,
        description="A 16-bit branch beside each layer's codes, of its largest singular values; null gives none.",
    )
    allocate: Allocate | None = Field(
        default=None, description="Bits for each output channel; null gives all channels of a layer the same."
    )
    menu: Menu | None = Field(
        default=None, description="Every layer rounded at several widths, for exact names to choose from; null is none."
    )
    choose: Choose | None = Field(
        default=None,
        description="Weight bits of each layer chosen from the menu by what they do to the samples, within a budget; "
        "null leaves them to layers.",
    )
    round: Round = Field(default=Round(), description="How weights are rounded; always runs.")
    reconstruct: Reconstruct | None = Field(
        default=None, description="The rounding of each unit learned; null leaves it as round gives it."
    )
    distill: Distill | None = Field(
        default=None, description="The whole quantized model tuned; null leaves it as it is."
    )
    exceptions: Exceptions | None = Field(
        default=None,
        description="What stays in full precision, found by trying each part alone; null is what layers say.",
    )
    differences: Differences | None = Field(
        default=None, description="Inputs quantized as differences between steps; null quantizes them as they are."
    )
    correct: Correct | None = Field(
        default=None, description="Predictions corrected in the sampler; null corrects none."
    )


class Calibration(Record):
    """The denoiser inputs that ranges and roundings are fitted on, recorded from the sampler."""

    seeds: Count = Field(
        default=32, description="Trajectories that are recorded; they must not overlap the evaluation's."
    )
    first_seed: Seed = Field(default=1_000_000, description="First of their seeds.")
    batch_size: Count = Field(default=32, description="Seeds per denoiser call.")
    steps: Count | None = Field(
        default=None,
        description="Trajectory steps recorded, evenly spread; null is all, which per-step activations need.",
    )
    shard_seeds: Count = Field(default=16, description="Seeds per task.")


class Memory(Record):
    """Bounds on memory."""

    budget_gib: Annotated[float, Field(gt=0, le=65_536)] = Field(
        default=2.0, description="Activation cache of one task, GiB; what does not fit goes to disk."
    )


class Budget(Record):
    """What a release may cost at most; refused before anything runs if the recipe's bits do not fit."""

    weight_bits_mean: Annotated[float, Field(gt=0, le=32)] | None = Field(
        default=None,
        description="Mean bits of a weight that a release may have, over all Conv and Linear layers; scales and "
        "tables of temporal features are not counted; null is no limit.",
    )


class Evaluation(Grown):
    """How the packed model is compared with the original, on seeds that calibration did not see."""

    _later: ClassVar[frozenset[str]] = frozenset({"clip", "lpips", "shown"})

    seeds: Annotated[int, Field(ge=2, le=1_000_000)] = Field(
        default=256, description="Samples that are compared with full precision, seed by seed."
    )
    first_seed: Seed = Field(default=0, description="First of their seeds.")
    batch_size: Count = Field(default=32, description="Seeds per denoiser call.")
    shard_seeds: Count = Field(default=64, description="Seeds per task.")
    sqnr_seeds: Count = Field(default=32, description="Seeds that the per-step SQNR is taken over, at most.")
    extractor: Extractor = Field(
        default=Extractor.EFFICIENTNET_LITE0,
        description="Features that the Fréchet distance is taken of; inception-v3 needs a file in extractor_weights.",
    )
    extractor_weights: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="File with the extractor's weights, below the recipe's folder (resolved: its SHA-256); only for "
        "inception-v3.",
    )
    grid: Count = Field(default=16, description="Images in the sample grid, at most.")
    shown: ShownSeeds = Field(
        default=ShownSeeds.FIRST,
        description="Whether pictures show the first seeds, or those whose samples are farthest from full precision's.",
    )
    clip: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="Folder of a CLIP model of transformers, below the recipe's folder (resolved: the SHA-256 of its "
        "files as one archive), for the CLIP score of a pipeline's images and prompts.",
    )
    lpips: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="File with the weights of torchvision's alexnet or vgg16, below the recipe's folder (resolved: its "
        "SHA-256), for the LPIPS of images.",
    )

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        needs = self.extractor is Extractor.INCEPTION_V3
        if needs != (self.extractor_weights is not None):
            got = "a file" if self.extractor_weights else "null"
            wanted = "a file" if needs else "null (its weights come with its package)"
            raise ValueError(f"extractor_weights: got {got} with extractor {self.extractor}, wanted {wanted}")
        return self


#: Fields that say how tasks run, and decide no byte of what they give.
HOW_IT_RUNS = ("resources", "deterministic")
_ONLY_WHERE_SAID = (*HOW_IT_RUNS, "prompts", "components")


class Recipe(Record):
    """A whole recipe, with every field set."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")] = Field(
        default="recipe", description="Names the release, together with the model's; by default that of the file."
    )
    description: Annotated[str, Field(max_length=10_000)] = Field(
        default="", description="What the recipe is, in one line."
    )
    sampler: Sampler = Field(default=Sampler(), description="How samples are drawn.")
    prompts: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="File of prompts for a whole pipeline, below the recipe's folder (resolved: its SHA-256): text, "
        "TSV or JSON lines; null is a shipped set of 256, or all classes.",
    )
    components: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_*?]*$", max_length=100)], ComponentRecipe],
        Field(max_length=100),
    ] = Field(
        default={},
        description="Recipes of a whole pipeline's components, by name or pattern (text_encoder*): "
        "`transformer: svdquant-w4a8`, `text_encoder_3: weights-w8`. In a file, the name of a shipped recipe, a file, "
        "or a mapping that extends one.",
    )
    calibration: Calibration = Field(default=Calibration(), description="What ranges and roundings are fitted on.")
    weights: Weights = Field(default=Weights(), description="Format of the weights.")
    activations: Activations = Field(default=Activations(), description="Format of the layers' inputs.")
    attention: Attention = Field(default=Attention(), description="Format of the matmuls of attention.")
    skip_split: bool = Field(
        default=True, description="Split layers that read a concatenation: each part has its own ranges and scales."
    )
    layers: Annotated[tuple[LayerException, ...], Field(max_length=10_000)] = Field(
        default=(), description="Exceptions, in order; of several that match a layer, later ones win, field by field."
    )
    passes: Passes = Field(default=Passes(), description="The steps of the method.")
    memory: Memory = Field(default=Memory(), description="Bounds on memory.")
    budget: Budget = Field(default=Budget(), description="What a release may cost at most.")
    evaluation: Evaluation = Field(
        default=Evaluation(), description="How the packed model is compared with the original."
    )
    seed: Seed = Field(default=0, description="Of every random choice while fitting.")
    resources: JobResources = Field(default=JobResources(), description="What tasks run on; names no task.")
    deterministic: bool = Field(
        default=False,
        description="Run all tasks that use a GPU on one type of it, with torch's deterministic algorithms; names no "
        "task.",
    )

    @model_serializer(mode="wrap")
    def _without_what_is_not_asked_for(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out how tasks run, and prompts, where nothing is said of them, so that digests stay what they were."""
        values: dict[str, Any] = handler(self)
        if not self.sampler.arguments:
            values["sampler"] = {name: value for name, value in values["sampler"].items() if name != "arguments"}
        return {name: value for name, value in values.items() if name not in _ONLY_WHERE_SAID or self.says(name)}

    def says(self, name: str) -> bool:
        """Whether a field has another value than its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def without_how_it_runs(self) -> Self:
        """Return the recipe as a release tells it: what decides its bytes, not where they were computed."""
        return self.replaced(**{name: type(self).model_fields[name].default for name in HOW_IT_RUNS})

    @property
    def modes(self) -> dict[str, ActivationMode]:
        """How ranges are found, by the field that says so: of layers' inputs, and of attention's operands, if any."""
        own = self.attention.mode or self.activations.mode
        return {"activations.mode": self.activations.mode} | ({"attention.mode": own} if self.attention.enabled else {})

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self._check_seeds()
        self._check_shards()
        self._check_finite_set()
        if self.passes.scale is not None and self.activations.bits is None:
            raise ValueError("passes.scale: got activations.bits null, wanted quantized activations")
        self._check_shift()
        self._check_allocation()
        self._check_low_rank()
        self._check_floats()
        self._check_menu()
        self._check_answers()
        self._check_choice()
        self._check_differences()
        self._check_frozen()
        self._check_exceptions()
        self._check_components()
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

    def _check_components(self) -> None:
        """Refuse an entry of the denoiser that says what the recipe's own sections say, and others that say nothing."""
        for name, entry in self.components.items():
            if not is_denoiser(name) and entry.weights is None:
                raise ValueError(f"components.{name}: got no weights, wanted a recipe, such as weights-w8")
            if is_denoiser(name) and (entry.weights is not None or entry.passes != type(entry)().passes):
                raise ValueError(
                    f"components.{name}: got weights or passes for the denoiser, wanted them in the recipe's own "
                    "sections"
                )

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
        if scale is None or scale.shift is Shift.NONE:
            return
        if self.activations.is_dynamic:
            raise ValueError(
                f"passes.scale.shift: got {scale.shift} with activations {self.activations.mode}, wanted static or "
                "per_step ranges, or none"
            )
        if scale.shift is Shift.SKIP and not self.skip_split:
            raise ValueError("passes.scale.shift: got skip with skip_split false, wanted skip_split true, or variance")

    def _check_allocation(self) -> None:
        """Refuse bits per output channel where formats have no room for them."""
        weights, allocate = self.weights, self.passes.allocate
        if allocate is None or allocate.is_uniform:
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

    def _check_menu(self) -> None:
        """Refuse choices from a menu that is not there, or that something else makes too."""
        for place, entry in enumerate(self.layers):
            asks = {"weights.promoted": entry.weights.promoted, "activations.range_bits": entry.activations.range_bits}
            for field, value in asks.items():
                if value and (self.passes.menu is None or exact_name(entry.match) is None):
                    got = f"match {entry.match!r}, passes.menu {'null' if self.passes.menu is None else 'set'}"
                    raise ValueError(f"layers.{place}.{field}: got {got}, wanted an exact name and passes.menu")
            mode = activations_for(self.activations, [entry], f"layers.{place}.activations").mode
            if entry.activations.range_bits and mode != "per_step":
                raise ValueError(f"layers.{place}.activations.range_bits: got mode {mode}, wanted per_step")
        if self.passes.menu is None:
            return
        if self.passes.allocate is not None and not self.passes.allocate.is_uniform:
            raise ValueError("passes.menu: got it beside passes.allocate, wanted one of them to choose weight bits")
        if self.passes.low_rank is not None:
            raise ValueError("passes.menu: got it beside passes.low_rank, wanted one of them")
        if NumberType.E4M3 in {self.weights.type, *(entry.weights.type for entry in self.layers)}:
            raise ValueError("passes.menu: got it beside weights.type e4m3, which has no widths, wanted int")
        if self.activations.step_bits is not None:
            raise ValueError("passes.menu: got it beside activations.step_bits, wanted one choice of activation bits")

    def _check_answers(self) -> None:
        """Refuse codes that answer for the layers before, and are learned again for inputs without their error."""
        learned = self.passes.reconstruct
        if self.passes.round.answers and learned is not None and learned.inputs is UnitInputs.FP:
            raise ValueError(
                "passes.reconstruct.inputs: got fp beside passes.round.inputs quantized, wanted quantized, or "
                "passes.reconstruct null: learned for exact inputs, codes no longer answer for the layers before"
            )

    def _check_choice(self) -> None:
        """Refuse measured bits where there is no choice, or where something else says them."""
        if self.passes.choose is None:
            return
        widths = () if self.passes.menu is None else self.passes.menu.weight_bits
        if len(widths) < 2:
            got = "null" if self.passes.menu is None else f"weight_bits {list(widths)}"
            raise ValueError(f"passes.choose: got it with passes.menu {got}, wanted a menu of two widths at least")
        for place, entry in enumerate(self.layers):
            if entry.weights.promoted:
                raise ValueError(
                    f"layers.{place}.weights.promoted: got {entry.weights.promoted:g} beside passes.choose, wanted "
                    "null; it chooses for whole layers"
                )
        if self.budget.weight_bits_mean is not None:
            raise ValueError(
                f"budget.weight_bits_mean: got {self.budget.weight_bits_mean:g} beside passes.choose, wanted null; "
                "passes.choose.weight_bits_mean is what bits are chosen within"
            )

    def _check_exceptions(self) -> None:
        """Refuse exceptions from nothing, and a second choice of bits for each step."""
        chosen, own = self.passes.exceptions, self.activations
        if chosen is None:
            return
        if own.bits is None:
            raise ValueError("passes.exceptions: got activations.bits null, wanted quantized activations")
        if not chosen.choices:
            return
        if own.mode != "per_step" or own.type is NumberType.E4M3:
            raise ValueError(
                f"passes.exceptions.choices: got activations of mode {own.mode}, type {own.type}, wanted mode per_step "
                "and type int"
            )
        others = {
            "activations.step_bits": own.step_bits is not None,
            "passes.menu.activation_bits": self.passes.menu is not None and bool(self.passes.menu.activation_bits),
            "passes.differences": self.passes.differences is not None,
        }
        for name, is_there in others.items():
            if is_there:
                raise ValueError(f"passes.exceptions.choices: got it beside {name}, wanted one choice of input bits")

    def _check_differences(self) -> None:
        """Refuse differences between steps of what has no ranges of its own at each, or other bits there."""
        chosen, taken = self.activations, self.passes.differences
        if taken is None:
            return
        if chosen.bits is None or chosen.mode != "per_step" or chosen.type is NumberType.E4M3:
            raise ValueError(
                f"passes.differences: got activations of bits {chosen.bits or 'null'}, mode {chosen.mode}, type "
                f"{chosen.type}, wanted bits, mode per_step and type int"
            )
        most = max(taken.widths(self.sampler.num_inference_steps))
        if chosen.bits < most:
            raise ValueError(
                f"passes.differences: got {most} bits with activations.bits {chosen.bits}, wanted at most as many"
            )
        on_menu = self.passes.menu is not None and self.passes.menu.activation_bits
        if chosen.step_bits is not None or on_menu:
            other = "activations.step_bits" if chosen.step_bits is not None else "passes.menu.activation_bits"
            raise ValueError(f"passes.differences: got it beside {other}, wanted one choice of activation bits")

    def _check_frozen(self) -> None:
        """Refuse what is learned around codes for inputs as they are where differences are quantized."""
        distill = self.passes.distill
        if distill is not None and not self._learns_codes and self.passes.differences is not None:
            raise ValueError(
                f"passes.distill.codes: got {distill.codes} beside passes.differences, wanted one of them: it learns "
                "for inputs that are quantized as they are"
            )

    @property
    def _learns_codes(self) -> bool:
        """Whether distillation learns codes of weights."""
        return self.passes.distill is not None and self.passes.distill.codes is WeightCodes.LEARNED

    def _check_low_rank(self) -> None:
        """Refuse branches beside what has no room for them."""
        low_rank, allocate = self.passes.low_rank, self.passes.allocate
        if low_rank is None:
            return
        if allocate is not None and not allocate.is_uniform:
            raise ValueError(
                f"passes.low_rank: got it with passes.allocate {allocate.method}, wanted one of the two: errors of "
                "channels are measured without a branch"
            )
        if low_rank.smoothing is not None and self.passes.scale is not None:
            raise ValueError(
                f"passes.low_rank.smoothing: got {low_rank.smoothing} with passes.scale, wanted null: that scales "
                "channels"
            )
        if low_rank.smoothing is not None and self.activations.bits is None:
            raise ValueError(
                f"passes.low_rank.smoothing: got {low_rank.smoothing} with activations.bits null, wanted null, or "
                "quantized activations"
            )

    def _check_floats(self) -> None:
        """Refuse passes that work on integer codes where numbers are E4M3."""
        passes, attention = self.passes, self.attention
        if NumberType.E4M3 in {self.weights.type, *(entry.weights.type for entry in self.layers)}:
            taken = {name for name in ("reconstruct", "allocate") if getattr(passes, name) is not None}
            if self._learns_codes:
                taken.add("distill")
            if passes.temporal is not None and passes.temporal.method is TemporalRounding.RECONSTRUCT:
                taken.add("temporal.method reconstruct")
            if taken:
                raise ValueError(
                    f"weights.type: got e4m3 with passes.{min(taken)}, wanted int, whose codes that pass chooses among"
                )
        if self.activations.bits is None:
            return
        if (
            self.activations.type is NumberType.E4M3
            and attention.enabled
            and not (attention.bits == 8 and attention.softmax_bits in (8, EXACT_SOFTMAX_BITS))
        ):
            raise ValueError(
                f"attention.bits: got {attention.bits}, softmax_bits {attention.softmax_bits} with activations.type "
                "e4m3, wanted 8 and 8 or 16, or enabled false"
            )
        types = {self.activations.type, *(entry.activations.type for entry in self.layers)}
        if self._learns_codes and NumberType.E4M3 in types:
            raise ValueError("activations.type: got e4m3 with passes.distill, wanted int, whose grids that pass learns")
        if passes.scale is not None and passes.scale.shift is not Shift.NONE and NumberType.E4M3 in types:
            raise ValueError(
                f"passes.scale.shift: got {passes.scale.shift} with e4m3, whose steps follow each number, wanted none"
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

    def _check_shards(self) -> None:
        """Refuse seeds in so many shards that a job would have more tasks than anybody waits for."""
        passes, step_bits = self.passes, self.activations.step_bits
        sharded = [
            ("calibration", self.calibration.seeds, self.calibration.shard_seeds),
            ("evaluation", self.evaluation.seeds, self.evaluation.shard_seeds),
        ]
        if passes.correct is not None:
            seeds = passes.correct.seeds + passes.correct.held_out_seeds
            sharded.append(("passes.correct", seeds, passes.correct.shard_seeds))
        if passes.distill is not None:
            sharded.append(("passes.distill", passes.distill.seeds, passes.distill.shard_seeds))
        if step_bits is not None:
            sharded.append(("activations.step_bits", step_bits.seeds, step_bits.shard_seeds))
        for name, seeds, shard in sharded:
            if (tasks := -(-seeds // shard)) > MOST_SHARDS:
                raise ValueError(
                    f"{name}.shard_seeds: got {shard} of {seeds} seeds, which makes {tasks} tasks, wanted at least "
                    f"{-(-seeds // MOST_SHARDS)}, for at most {MOST_SHARDS} tasks"
                )

    def _fitted_seeds(self) -> list[tuple[str, int, int]]:
        """Return (section, first seed, count) of all that something is fitted to."""
        found = [("calibration", self.calibration.first_seed, self.calibration.seeds)]
        correct, step_bits = self.passes.correct, self.activations.step_bits
        if correct is not None:
            found.append(("passes.correct", correct.first_seed, correct.seeds + correct.held_out_seeds))
        if self.passes.distill is not None:
            found.append(("passes.distill", self.passes.distill.first_seed, self.passes.distill.seeds))
        if self.passes.exceptions is not None:
            found.append(("passes.exceptions", self.passes.exceptions.first_seed, self.passes.exceptions.seeds))
        if self.passes.choose is not None:
            found.append(("passes.choose", GAIN_SEEDS.first, GAIN_SEEDS.count))
        if step_bits is not None:
            found.append(("activations.step_bits", step_bits.first_seed, step_bits.seeds))
        return found
