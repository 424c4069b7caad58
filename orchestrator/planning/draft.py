"""A job's graph while it is drawn: the model, the recipe, and what the passes so far have left for those to come."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.db.rows import ModelRow
from orchestrator.graph import Resources, TaskNode, TaskRef, task_node
from orchestrator.planning.components import check_components
from orchestrator.planning.conditioning import check_conditioning
from orchestrator.planning.costs import GIB, Cost, Costs
from orchestrator.planning.formats import QuantizedUnit, choose_formats
from orchestrator.planning.model import ModelInfo
from orchestrator.planning.pipeline import check_pipeline, pipeline_of, with_guidance
from orchestrator.planning.sampler import with_scheduler
from orchestrator.prompts.choose import prompts_digest
from quant_spec.allocation import without_choices
from quant_spec.prompts import PromptPart
from quant_spec.recipe import Recipe
from quant_spec.sampler import Sampler
from quant_spec.task import TaskInputs, TaskKind, TaskParams

#: What a task reads: a digest, or another task's output.
Source = str | TaskRef


@dataclass(frozen=True, slots=True)
class Told:
    """What of the prompts a task is told: which part, of which file, and what it encodes to."""

    part: PromptPart | None = None
    prompts: str | None = None
    embeddings: Source | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """What a pass is given, and what it gives to the next.

    Attributes
    ----------
    row, model
        The model as it is registered, and as the planner sees it.
    given
        The recipe as it was written.
    recipe, sampler
        The same with its scheduler named, which is what tasks are told.
    costs
        What tasks of this recipe cost on this model.
    units
        To quantize, in the order in which they run; without the temporal block.
    base_units
        The same in the formats that a menu is rounded in; without one, `units`.
    block
        The temporal information block, if it is a unit of its own.
    calibration
        Shards.
    step_bits
        The choice of bits for each trajectory step, if there is one.
    factors
        What `scale` chose, or the smoothing of `low_rank`, by unit.
    branches
        What `low_rank` chose, by unit.
    allocation
        The choice of bits of output channels, if there is one.
    gains
        What an error at each step does to the final samples, if that was measured.
    states
        The state of each unit, by name.
    packed
        The model that diffusers loads.
    score
        Its figures.
    prompts
        The file that a whole pipeline is told from; None for a bare denoiser, and for all classes.
    embeddings
        What the prompts of the calibration's and of the evaluation's seeds encode to, where tasks of their own do that.
    whole, packed_embeddings
        The pipeline's tree with packed text encoders, and what those make of the evaluation's prompts, if there are
        any.
    """

    row: ModelRow
    model: ModelInfo
    given: Recipe
    recipe: Recipe
    sampler: Sampler
    costs: Costs
    units: tuple[QuantizedUnit, ...]
    base_units: tuple[QuantizedUnit, ...]
    block: QuantizedUnit | None = None
    calibration: tuple[Source, ...] = ()
    step_bits: Source | None = None
    factors: Mapping[str, Source] = field(default_factory=dict)
    branches: Mapping[str, Source] = field(default_factory=dict)
    allocation: Source | None = None
    gains: Source | None = None
    states: Mapping[str, Source] = field(default_factory=dict)
    packed: Source | None = None
    score: Source | None = None
    prompts: str | None = None
    embeddings: Mapping[PromptPart, Source] = field(default_factory=dict)
    whole: Source | None = None
    packed_embeddings: Source | None = None

    @classmethod
    def begin(cls, row: ModelRow, recipe: Recipe) -> Draft:
        """Return the draft that the first pass is given.

        Raises
        ------
        RecipeError
            If the recipe does not fit the model.
        QuantizationError
            If its scheduler does not.
        """
        check_pipeline(row, recipe)
        check_components(row, recipe)
        if pipeline_of(row) is None:
            check_conditioning(row, recipe.sampler)
        given = with_guidance(recipe, row)
        recipe = with_scheduler(given, row)
        model = ModelInfo.read(row.digest, row.inspection).resized(recipe.sampler.arguments)
        units = tuple(choose_formats(model, recipe))
        base = units if recipe.passes.menu is None else tuple(choose_formats(model, without_choices(recipe)))
        prompts = prompts_digest(row, recipe.prompts)
        costs = Costs(model, recipe)
        return cls(row, model, given, recipe, recipe.sampler, costs, units, base, prompts=prompts)

    def told(self, part: PromptPart) -> Told:
        """Return what of the prompts tasks that sample are told; nothing for a bare denoiser."""
        return Told() if self.model.pipeline is None else Told(part, self.prompts, self.embeddings.get(part))

    def told_packed(self) -> Told:
        """Return what of the prompts tasks are told that sample with the quantized model."""
        told = self.told(PromptPart.EVALUATION)
        return told if self.packed_embeddings is None else replace(told, embeddings=self.packed_embeddings)

    @property
    def pipeline_tree(self) -> Source:
        """The tree that the quantized denoiser samples in: the model's own, or that with packed text encoders."""
        return self.model.digest if self.whole is None else self.whole

    @property
    def cache_bytes(self) -> int:
        """Bytes that a task keeps in memory of what it caches."""
        return int(self.recipe.memory.budget_gib * GIB)

    @property
    def packed_model(self) -> Source:
        """The packed model, once there is one."""
        if self.packed is None:
            raise ValueError("draft: got no packed model, wanted this pass after pack")
        return self.packed

    def running_order(self) -> dict[str, Source]:
        """Return the states of all quantized units in the order in which they run; the temporal block is first."""
        block = [] if self.block is None else [self.block]
        return {unit.name: self.states[unit.name] for unit in (*block, *self.units)}

    def node(
        self,
        kind: TaskKind,
        params: TaskParams,
        inputs: TaskInputs[Source],
        cost: Cost,
        label: str,
    ) -> TaskNode:
        """Make a task."""
        return task_node(
            kind.name,
            params.to_json(),
            inputs.to_json(),
            resources=Resources(
                memory_bytes=cost.memory_bytes, gpu_memory_bytes=cost.gpu_memory_bytes if kind.gpu else 0
            ),
            work=round(cost.work, 6),
            label=label,
        )


#: A pass at work: it makes tasks, each after all that it depends on, and returns the draft for the next pass.
Drawing = Generator[TaskNode, None, Draft]
