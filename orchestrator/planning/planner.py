"""From a recipe and a model to the graph of tasks.

    model ── calibrate (seeds) ── round (units) ── reconstruct unit 1..B ── pack ── evaluate (seeds) ── score ── release
         │                    └── temporal ─────────────┴────────────────────┘
         └── reference (seeds) ───────────────────────────────────────────────────────┘

If activation bits differ between trajectory steps, `step_effects` (seeds) and `step_bits` lie between calibrate and
round. With the passes `scale` and `allocate`, `scale` (units), then `channel_errors` (units) and `allocate`, lie before
round; with `distill`, that task and the trajectories that it needs between reconstruct and pack; with
`correct`, `noise` (seeds) and `correct` between pack and evaluate.

A task's parameters hold what decides its bytes and nothing else, so that recipes share every task up to where they
differ. Planning is a pure function: no torch, no clock, no database, nothing about the machine.

Parameters, inputs and outputs by kind (`sampler`: the recipe's section; `seeds`: {"first", "count"}; `unit`: a unit's
name with the formats of its layers and attentions, see `orchestrator.planning.formats`):

=========== ================================================== ========================================== ==============
kind        parameters                                         inputs                                     outputs
=========== ================================================== ========================================== ==============
calibrate   sampler, seeds, batch_size, steps                  model                                      calibration
reference   sampler, seeds, batch_size, sqnr_seeds             model                                      reference
step_effects sampler, seeds, batch_size, choices, layers, seed model, calibration (all)                   effects
step_bits   method, target_mean, threshold                     effects                                    step_bits
temporal    unit, layers, attentions, pass                     model, calibration (all)                   state
scale       units: [unit], seed, forward_batch_size,           model, calibration (all), step_bits (if    factors:<unit>
            rounding, damping (if closed_form), pass           there)
channel_    units: [unit], layers (names), seed,               model, calibration (all), factors (if      errors
errors      forward_batch_size, samples, positions             there)
allocate    method, extra                                      errors                                     allocation
round       units: [unit], seed, cache_bytes,                  model, calibration (all), step_bits,       state:<unit>
            forward_batch_size, pass                           factors and allocation (if there)
reconstruct unit, layers, attentions, seed, cache_bytes,       model, calibration (all), state, earlier   state
            forward_batch_size, pass                           (units before it, if inputs are quantized),
                                                               temporal (if it concerns the unit)
distill     units (names), seed, pass                          model, trajectories (references), states   state:<unit>
pack        sampler, units (names), unknown_timestep           model, states                              packed
noise       sampler, batch_size                                packed, reference                          noise
correct     pass, channel_dim                                  packed, noise, held_out (noise of others)  packed
evaluate    sampler, seeds, batch_size, sqnr_seeds             packed, reference                          evaluation
score       sampler, seeds, sqnr_seeds, extractor, grid        packed, references, evaluations, model,    score, grid
                                                               extractor_weights (if the recipe has any)
release     model: {"name", "class_name", "source"},           packed, score, calibration, model          artifact
            recipe: {"name", "digest", "config"}
=========== ================================================== ========================================== ==============

`sqnr_seeds` of a shard counts its first seeds whose trajectory is recorded, or compared; `cache_bytes` bounds what a
task keeps in memory; `forward_batch_size` is for passes over the calibration set; `pass` is the pass's own parameters.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.db.rows import ModelRow
from orchestrator.graph import Resources, TaskNode, TaskRef, task_node
from orchestrator.planning.conditioning import check_conditioning
from orchestrator.planning.costs import GIB, Cost, Costs
from orchestrator.planning.formats import UnitPlan, allocated_layers, plan_formats, varied_layers
from orchestrator.planning.groups import group_label, round_groups
from orchestrator.planning.model import ModelInfo
from orchestrator.planning.mpqdm import allocation_tasks, distill_tasks
from orchestrator.planning.scaling import scale_parameters
from orchestrator.planning.shards import shards
from orchestrator.planning.step_bits import step_bits_tasks
from orchestrator.planning.temporal import TEMPORAL_UNIT, holds, take_out
from orchestrator.recipes.load import resolve
from orchestrator.recipes.passes import Round
from orchestrator.recipes.schema import Recipe


def plan(model: ModelRow, recipe: Recipe, *, gpus_per_task: float = 0.0) -> tuple[Iterator[TaskNode], TaskNode]:
    """Plan a quantization job.

    Parameters
    ----------
    model
        With its inspection.
    gpus_per_task
        GPUs that each computing task asks for; no part of any key.

    Returns
    -------
    (iterator of TaskNode, TaskNode)
        The tasks, each after all that it depends on, made as they are asked for; and the last of them, the release.

    Raises
    ------
    RecipeError
        If the recipe does not fit the model; before anything is returned.
    """
    planner = _Planner(model, recipe, gpus_per_task)
    target = deque(planner.nodes(), maxlen=1)[0]
    return planner.nodes(), target


class _Planner:
    """Draws the graph of one model and recipe."""

    def __init__(self, model: ModelRow, recipe: Recipe, gpus: float) -> None:
        check_conditioning(model, recipe.sampler)
        info = ModelInfo.read(model.digest, model.inspection)
        self.row = model
        self.recipe = recipe
        self.gpus = gpus
        self.plans = plan_formats(info, recipe)
        self.temporal: UnitPlan | None = None
        if recipe.passes.temporal is not None:
            self.temporal, self.plans = take_out(info, self.plans, recipe, recipe.passes.temporal)
        self.costs = Costs(info, recipe)
        self.model = (model.digest,)
        self.sampler = recipe.sampler.model_dump(mode="json")
        #: whether samples are packed tokens, (tokens, channels)
        self.is_tokens = info.has_tokens
        self.cache_bytes = int(recipe.memory.budget_gib * GIB)

    def nodes(self) -> Iterator[TaskNode]:
        """Make all tasks in dependency order, the release last."""
        calibration: list[TaskRef] = []
        for node in self._calibrate():
            calibration.append(TaskRef(node.id, "calibration"))
            yield node
        step_bits: list[TaskRef] = []
        for node in self._choose_step_bits(calibration):
            step_bits = [TaskRef(node.id, "step_bits")]
            yield node
        states: dict[str, TaskRef] = {}
        for node in self._temporal(calibration):
            states[TEMPORAL_UNIT] = TaskRef(node.id, "state")
            yield node
        factors: dict[str, TaskRef] = {}
        for node, units in self._scale(calibration, step_bits):
            factors |= {unit: TaskRef(node.id, f"factors:{unit}") for unit in units}
            yield node
        allocation: list[TaskRef] = []
        for node in self._allocate(calibration, factors):
            allocation = [TaskRef(node.id, "allocation")]
            yield node
        for node, units in self._round(calibration, step_bits, factors, allocation):
            states |= {unit: TaskRef(node.id, f"state:{unit}") for unit in units}
            yield node
        for node, unit in self._reconstruct(calibration, states):
            states[unit] = TaskRef(node.id, "state")
            yield node
        for node in self._distill(states):
            if node.kind == "distill":
                states = {unit: TaskRef(node.id, f"state:{unit}") for unit in states}
            yield node
        pack = self._pack(states)
        yield pack
        packed = TaskRef(pack.id, "packed")
        for node in self._correct(packed):
            packed = TaskRef(node.id, "packed") if node.kind == "correct" else packed
            yield node
        references: list[TaskRef] = []
        evaluations: list[TaskRef] = []
        for node in self._measure(packed):
            (references if node.kind == "reference" else evaluations).append(TaskRef(node.id, _MEASURED[node.kind]))
            yield node
        score = self._score(packed, references, evaluations)
        yield score
        yield self._release(packed, TaskRef(score.id, "score"), calibration)

    def _calibrate(self) -> Iterator[TaskNode]:
        section = self.recipe.calibration
        steps = None if section.steps == self.recipe.sampler.num_inference_steps else section.steps
        for shard in shards(section.first_seed, section.seeds, section.shard_seeds):
            batch = min(section.batch_size, shard.count)
            yield self._node(
                "calibrate",
                {"sampler": self.sampler, "seeds": shard.seeds, "batch_size": batch, "steps": steps},
                {"model": self.model},
                self.costs.sample(shard.count, batch, recorded=shard.count),
                shard.label,
            )

    def _choose_step_bits(self, calibration: Sequence[TaskRef]) -> Iterator[TaskNode]:
        """Make the tasks that choose activation bits for each step, the choice last; none if they are the same."""
        section, layers = self.recipe.activations.step_bits, varied_layers(self.plans)
        if section is not None and layers:
            common = {"sampler": self.sampler, "layers": layers, "seed": self.recipe.seed}
            inputs: dict[str, Sequence[str | TaskRef]] = {"model": self.model, "calibration": calibration}
            yield from step_bits_tasks(self._node, section, common, inputs, self.costs)

    def _temporal(self, calibration: Sequence[TaskRef]) -> Iterator[TaskNode]:
        config = self.recipe.passes.temporal
        if config is None or self.temporal is None:
            return
        yield self._node(
            "temporal",
            {**self.temporal.parameters(), **config.parameters()},
            {"model": self.model, "calibration": calibration},
            self.costs.temporal(self.temporal, config),
            f"{len(self.temporal.layers)} layers",
        )

    def _scale(
        self, calibration: Sequence[TaskRef], step_bits: Sequence[TaskRef]
    ) -> Iterator[tuple[TaskNode, list[str]]]:
        """Make the tasks that scale input channels, each with its units."""
        config, rounding = self.recipe.passes.scale, self.recipe.passes.round
        if config is None:
            return
        for group in round_groups(self.plans, rounding, self.cache_bytes):
            inputs = self._group_inputs(group, calibration, step_bits)
            params = scale_parameters(group, config, rounding, self.recipe)
            cost = self.costs.scale(group, config, rounding)
            yield self._node("scale", params, inputs, cost, group_label(group)), [each.unit.name for each in group]

    def _group_inputs(
        self, group: Sequence[UnitPlan], calibration: Sequence[TaskRef], step_bits: Sequence[TaskRef]
    ) -> dict[str, Sequence[str | TaskRef]]:
        """Return what tasks on a group of units read, whatever they do."""
        inputs: dict[str, Sequence[str | TaskRef]] = {"model": self.model, "calibration": calibration}
        return inputs | ({"step_bits": step_bits} if step_bits and varied_layers(group) else {})

    def _allocate(self, calibration: Sequence[TaskRef], factors: Mapping[str, TaskRef]) -> Iterator[TaskNode]:
        """Make the tasks that choose the bits of output channels, the choice last; none if all have the same."""
        config = self.recipe.passes.allocate
        if config is None or config.method == "uniform":
            return
        groups = list(round_groups(self.plans, Round(), self.cache_bytes))
        inputs: dict[str, Sequence[str | TaskRef]] = {"model": self.model, "calibration": calibration}
        common = {name: value for name, value in self._common().items() if name != "cache_bytes"}
        yield from allocation_tasks(self._node, groups, inputs, factors, config, common, self.costs)

    def _distill(self, states: Mapping[str, TaskRef]) -> Iterator[TaskNode]:
        """Make the trajectories that are distilled from, and the task that does it, last."""
        config = self.recipe.passes.distill
        if config is None:
            return
        ordered = {unit: states[unit] for unit in self._units()}
        yield from distill_tasks(self._node, ordered, self.model, self.recipe, config, self.costs)

    def _units(self) -> list[str]:
        """Return the names of all quantized units, in the order in which they run."""
        return [*([TEMPORAL_UNIT] if self.temporal is not None else []), *(each.unit.name for each in self.plans)]

    def _round(
        self,
        calibration: Sequence[TaskRef],
        step_bits: Sequence[TaskRef],
        factors: Mapping[str, TaskRef],
        allocation: Sequence[TaskRef],
    ) -> Iterator[tuple[TaskNode, list[str]]]:
        """Make the tasks that round groups of units, each with its units."""
        config = self.recipe.passes.round
        common = self._common() | config.parameters()
        for group in round_groups(self.plans, config, self.cache_bytes):
            names = [each.unit.name for each in group]
            inputs = self._group_inputs(group, calibration, step_bits)
            if allocation and allocated_layers(group):
                inputs["allocation"] = allocation
            if factors:
                inputs["factors"] = [factors[name] for name in names]
            params = {"units": [each.parameters() for each in group], **common}
            yield self._node("round", params, inputs, self.costs.round(group, config), group_label(group)), names

    def _reconstruct(
        self, calibration: Sequence[TaskRef], rounded: Mapping[str, TaskRef]
    ) -> Iterator[tuple[TaskNode, str]]:
        config = self.recipe.passes.reconstruct
        if config is None:
            return
        common = self._common() | config.parameters()
        earlier: list[TaskRef] = []
        for each in self.plans:
            name = each.unit.name
            inputs: dict[str, Sequence[str | TaskRef]] = {
                "model": self.model,
                "calibration": calibration,
                "state": [rounded[name]],
            }
            if config.inputs == "quantized":
                inputs["earlier"] = tuple(earlier)
            if self.temporal is not None and (config.inputs == "quantized" or holds(each, self.temporal)):
                inputs["temporal"] = [rounded[TEMPORAL_UNIT]]
            node = self._node(
                "reconstruct", each.parameters() | common, inputs, self.costs.reconstruct(each, config), name
            )
            earlier.append(TaskRef(node.id, "state"))
            yield node, name

    def _pack(self, states: Mapping[str, TaskRef]) -> TaskNode:
        units = self._units()
        policy = self.recipe.activations.unknown_timestep
        return self._node(
            "pack",
            {"sampler": self.sampler, "units": units, **({} if policy == "error" else {"unknown_timestep": policy})},
            {"model": self.model, "states": [states[name] for name in units]},
            self.costs.pack(),
            f"{len(units)} units",
            gpus=0.0,
        )

    def _correct(self, packed: TaskRef) -> Iterator[TaskNode]:
        """Make the tasks that correct the packed model's predictions, the corrected model last."""
        config = self.recipe.passes.correct
        if config is None:
            return
        first = list(shards(config.first_seed, config.seeds, config.shard_seeds))
        others = list(shards(config.first_seed + config.seeds, config.held_out_seeds, config.shard_seeds))
        moments: list[TaskRef] = []
        for shard in (*first, *others):
            batch = min(config.batch_size, shard.count)
            params = {"sampler": self.sampler, "seeds": shard.seeds, "batch_size": batch, "sqnr_seeds": shard.count}
            cost = self.costs.sample(shard.count, batch, recorded=shard.count)
            reference = self._node("reference", params, {"model": self.model}, cost, shard.label)
            yield reference
            inputs = {"packed": [packed], "reference": [TaskRef(reference.id, "reference")]}
            cost = self.costs.noise(shard.count, batch)
            node = self._node("noise", {"sampler": self.sampler, "batch_size": batch}, inputs, cost, shard.label)
            moments.append(TaskRef(node.id, "noise"))
            yield node
        yield self._node(
            "correct",
            config.parameters() | {"channel_dim": -1 if self.is_tokens else 1},
            {"packed": [packed], "noise": moments[: len(first)], "held_out": moments[len(first) :]},
            self.costs.correct(),
            f"{config.seeds} seeds",
            gpus=0.0,
        )

    def _measure(self, packed: TaskRef) -> Iterator[TaskNode]:
        """Make the references and the evaluations that are compared with them."""
        section = self.recipe.evaluation
        for shard in shards(section.first_seed, section.seeds, section.shard_seeds, section.sqnr_seeds):
            batch = min(section.batch_size, shard.count)
            params = {"sampler": self.sampler, "seeds": shard.seeds, "batch_size": batch, "sqnr_seeds": shard.sqnr}
            cost = self.costs.sample(shard.count, batch, recorded=shard.sqnr)
            reference = self._node("reference", params, {"model": self.model}, cost, shard.label)
            yield reference
            inputs = {"packed": [packed], "reference": [TaskRef(reference.id, "reference")]}
            cost = self.costs.evaluate(shard.count, batch, shard.sqnr)
            yield self._node("evaluate", params, inputs, cost, shard.label)

    def _score(self, packed: TaskRef, references: Sequence[TaskRef], evaluations: Sequence[TaskRef]) -> TaskNode:
        section = self.recipe.evaluation
        inputs: dict[str, Sequence[str | TaskRef]] = {"packed": [packed], "references": references}
        inputs |= {"evaluations": evaluations, "model": self.model}
        if section.extractor_weights is not None:
            inputs["extractor_weights"] = [section.extractor_weights]
        params = {
            "sampler": self.sampler,
            "seeds": {"first": section.first_seed, "count": section.seeds},
            "sqnr_seeds": min(section.sqnr_seeds, section.seeds),
            "extractor": section.extractor,
            "grid": min(section.grid, section.seeds),
        }
        return self._node("score", params, inputs, self.costs.score(), f"{section.seeds} seeds")

    def _release(self, packed: TaskRef, score: TaskRef, calibration: Sequence[TaskRef]) -> TaskNode:
        resolved = resolve(self.recipe)
        return self._node(
            "release",
            {
                "model": self._origin(),
                "recipe": {"name": self.recipe.name, "digest": resolved.digest, "config": json.loads(resolved.json)},
            },
            {"packed": [packed], "score": [score], "calibration": calibration, "model": self.model},
            self.costs.release(),
            self.recipe.name,
            gpus=0.0,
        )

    def _origin(self) -> dict[str, str | None]:
        """Return what a release says of its base model; a folder's path means nothing on another machine."""
        source = self.row.source if self.row.source.startswith("hf:") else None
        return {"name": self.row.name, "class_name": self.row.class_name, "source": source}

    def _common(self) -> dict[str, Any]:
        """Return what both passes over the calibration set are told."""
        return {
            "seed": self.recipe.seed,
            "cache_bytes": self.cache_bytes,
            "forward_batch_size": self.recipe.calibration.batch_size,
        }

    def _node(
        self,
        kind: str,
        params: Mapping[str, Any],
        inputs: Mapping[str, Sequence[str | TaskRef]],
        cost: Cost,
        label: str,
        gpus: float | None = None,
    ) -> TaskNode:
        resources = Resources(cpus=1.0, gpus=self.gpus if gpus is None else gpus, memory_bytes=cost.memory_bytes)
        return task_node(kind, params, inputs, resources=resources, work=round(cost.work, 6), label=label)


_MEASURED = {"reference": "reference", "evaluate": "evaluation"}
