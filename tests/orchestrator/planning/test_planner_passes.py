"""The planner, pass by pass: scaled channels, temporal block, correction, bits by step, allocation, distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskNode, TaskRef
from tests.orchestrator.planning_models import (
    AFTER_ROUND,
    UNITS,
    by_kind,
    inspection,
    layer_specs,
    layers,
    model,
    nodes_of,
    only,
    recipe,
    specs,
)

# --- scaled channels


def test_scale_comes_before_each_round_and_changes_nothing_else():
    plain, scaled = nodes_of(recipe("qdiffusion-w4a8")), nodes_of(recipe("qdiffusion-w4a8", "passes.scale={}"))
    sources = {unit["unit"]: (node, unit) for node in by_kind(scaled, "scale") for unit in node.params["units"]}
    for node in by_kind(scaled, "round"):
        units = [unit["unit"] for unit in node.params["units"]]
        assert node.inputs["factors"] == tuple(TaskRef(sources[unit][0].id, f"factors:{unit}") for unit in units)
        assert node.params["units"] == [sources[unit][1] for unit in units]
    for source, _ in sources.values():
        assert set(source.inputs) == {"model", "calibration"}
        assert (source.params["rounding"], source.params["damping"]) == ("closed_form", 0.03)
    assert [node.params for node in by_kind(plain, "round")] == [node.params for node in by_kind(scaled, "round")]
    assert all("factors" not in node.inputs for node in by_kind(plain, "round"))
    damped = nodes_of(recipe("qdiffusion-w4a8", "passes.scale={}", "passes.round.damping=0.1"))
    assert {node.params["damping"] for node in by_kind(damped, "scale")} == {0.1}
    kept = {node.id for node in plain if node.kind in ("calibrate", "reference")}
    assert kept <= {node.id for node in scaled}


def test_scale_parameters_are_those_that_matter():
    def params(*overrides: str) -> Mapping[str, Any]:
        return by_kind(nodes_of(recipe("base", "passes.scale={}", *overrides)), "scale")[0].params

    assert params()["rounding"] == "nearest"
    assert "damping" not in params()
    assert {"alpha", "xi"} <= set(params())
    assert not {"alpha", "xi"} & set(params("passes.scale.weighting=uniform"))
    smooth = params("passes.scale.method=smooth")
    assert smooth["exponent"] == 0.5
    assert not {"alpha", "xi", "iterations", "rounding"} & set(smooth)
    assert params("passes.scale.shift=skip")["consensus"] == 0.85
    assert params("passes.scale.shift=variance")["least_spread"] == 0.5
    assert "held_out" not in params()  # off: the task is the one of recipes that do not know it
    assert params("passes.scale.held_out=0.25")["held_out"] == 0.25
    with pytest.raises(RecipeError, match=r"passes\.scale\.held_out: got 0\.25"):
        params("passes.scale.held_out=0.25", "passes.scale.method=smooth")


def test_scale_takes_the_bits_chosen_for_each_step():
    nodes = nodes_of(recipe("ptqd-w4-mixed", "passes.scale={}", "memory.budget_gib=1e-9"))
    told = [node.inputs.get("step_bits") for node in by_kind(nodes, "scale")]
    assert [bits is None for bits in told] == [unit in ("conv_in", "conv_out") for unit in UNITS]
    assert told == [node.inputs.get("step_bits") for node in by_kind(nodes, "round")]


def test_scale_needs_quantized_activations_and_something_to_do():
    with pytest.raises(RecipeError, match=r"passes\.scale: got activations\.bits null"):
        recipe("base", "passes.scale={}", "activations.bits=null")
    with pytest.raises(RecipeError, match=r"passes\.scale.*got none with shift none"):
        recipe("base", "passes.scale={method: none}")


# --- the temporal information block


def timed_nodes(name: str = "qdiffusion-w4a8", *overrides: str) -> list[TaskNode]:
    return nodes_of(recipe(name, *overrides), model(inspection(timed=True)))


TIMED = [f"blocks.{i}.time_emb_proj" for i in range(4)]


def test_temporal_pass_takes_the_block_out_of_its_units():
    nodes = timed_nodes("qdiffusion-w4a8", "passes.temporal={}")
    node = only(nodes, "temporal")
    assert list(node.params["layers"]) == ["time_embedding.linear_1", "time_embedding.linear_2", *TIMED]
    assert set(node.inputs) == {"model", "calibration"}
    rounded = specs(nodes)
    assert "time_embedding" not in rounded  # nothing is left of that unit
    assert list(rounded["blocks.0"]["layers"]) == ["blocks.0.conv1", "blocks.0.conv2"]
    pack = only(nodes, "pack")
    assert pack.inputs["states"][0] == TaskRef(node.id, "state")
    learned = {node.label: TaskRef(node.id, "state") for node in by_kind(nodes, "reconstruct")}
    assert pack.inputs["states"][1:] == tuple(learned[unit] for unit in UNITS[1:])


def test_temporal_state_goes_to_the_units_that_hold_its_layers_and_the_others_are_shared():
    plain, timed = timed_nodes(), timed_nodes("qdiffusion-w4a8", "passes.temporal={}")
    state = TaskRef(only(timed, "temporal").id, "state")
    told = {node.label: node.inputs.get("temporal") for node in by_kind(timed, "reconstruct")}
    assert {unit for unit, given in told.items() if given == (state,)} == {f"blocks.{i}" for i in range(4)}
    assert {given for unit, given in told.items() if not unit.startswith("blocks")} == {None}
    quantized = timed_nodes("qdiffusion-w4a8", "passes.temporal={}", "passes.reconstruct.inputs=quantized")
    assert all("temporal" in node.inputs for node in by_kind(quantized, "reconstruct"))
    for unit in ("mid.attn", "up", "conv_out"):
        assert specs(timed)[unit] == specs(plain)[unit]


def test_temporal_finite_set_is_per_step_whatever_the_network_is():
    def modes(*overrides: str) -> tuple[set[str], set[str]]:
        nodes = timed_nodes("qdiffusion-w4a8", "passes.temporal={}", *overrides)
        block = {spec["activation"]["mode"] for spec in only(nodes, "temporal").params["layers"].values()}
        units = specs(nodes).values()
        return block, {spec["activation"]["mode"] for unit in units for spec in unit["layers"].values()}

    assert modes() == ({"per_step"}, {"per_step"})
    assert modes("activations.mode=static") == ({"per_step"}, {"static"})
    assert modes("activations.mode=static", "passes.temporal.finite_set=false") == ({"static"}, {"static"})
    assert modes("activations.mode=dynamic_sample") == ({"per_step"}, {"dynamic_sample"})


def test_temporal_block_keeps_its_bits_where_other_layers_have_bits_for_each_step():
    nodes = timed_nodes("ptqd-w4-mixed", "passes.temporal={}")
    block = only(nodes, "temporal").params["layers"]
    assert {spec["activation"]["bits"] for spec in block.values()} == {8}
    varied = {name for node in by_kind(nodes, "step_effects") for name in node.params["layers"]}
    assert varied
    assert not varied & set(block)


def test_passes_of_several_methods_compose():
    nodes = timed_nodes("tfmq-ptqd-w4a8", layers("[]"))
    kinds = [node.kind for node in nodes]
    assert {"temporal", "noise", "correct"} <= set(kinds)
    assert kinds.index("temporal") < kinds.index("reconstruct") < kinds.index("pack") < kinds.index("correct")
    assert kinds.index("correct") < kinds.index("evaluate")


def test_temporal_block_is_rounded_to_nearest_without_damping():
    nodes = timed_nodes("qdiffusion-w4a8", "passes.temporal={method: nearest}")
    assert "damping" not in only(nodes, "temporal").params


def test_temporal_parameters_are_those_that_matter():
    def params(*overrides: str) -> Mapping[str, Any]:
        nodes = timed_nodes("qdiffusion-w4a8", "passes.temporal={}", *overrides)
        return only(nodes, "temporal").params

    assert "cache_ratio" not in params()
    assert "iterations" not in params("passes.temporal.method=closed_form")
    assert params("passes.temporal.cache=true")["cache_ratio"] == 2.0


def test_temporal_pass_needs_a_block_and_all_steps():
    with pytest.raises(RecipeError, match=r"passes\.temporal: got only kept layers"):
        timed_nodes("base", "passes.temporal={}", layers('[{match: "*time*", keep: true}]'))
    without = inspection()
    del without["temporal"]
    with pytest.raises(RecipeError, match=r"an earlier Quantmill inspected, wanted it added again"):
        nodes_of(recipe("base", "passes.temporal={}"), model(without))
    with pytest.raises(RecipeError, match=r"calibration\.steps: got 5 with passes\.temporal, wanted null"):
        recipe("base", "passes.temporal={}", "calibration.steps=5", "activations.mode=static")


def test_unknown_timesteps_are_the_packed_models_business():
    assert "unknown_timestep" not in only(nodes_of(recipe()), "pack").params
    near = only(nodes_of(recipe("base", "activations.unknown_timestep=nearest")), "pack")
    assert near.params["unknown_timestep"] == "nearest"


# --- PTQD


def test_plan_corrects_the_packed_model_before_anything_reads_it():
    nodes = nodes_of(recipe("fast-w4a8", "passes.correct={seeds: 6, held_out_seeds: 4, shard_seeds: 4}"))
    packed, corrected = only(nodes, "pack"), only(nodes, "correct")
    noise = by_kind(nodes, "noise")
    references = {node.id: node for node in by_kind(nodes, "reference")}
    measured = [references[node.inputs["reference"][0].task].params for node in noise]  # type: ignore[union-attr]
    counts = [
        (params["seeds"]["first"] - 2_000_000, params["seeds"]["count"], params["sqnr_seeds"]) for params in measured
    ]
    assert counts == [(0, 4, 4), (4, 2, 2), (6, 4, 4)]
    assert all(node.inputs["packed"] == (TaskRef(packed.id, "packed"),) for node in noise)
    assert corrected.inputs["noise"] == tuple(TaskRef(node.id, "noise") for node in noise[:2])
    assert corrected.inputs["held_out"] == (TaskRef(noise[2].id, "noise"),)
    for kind in ("evaluate", "score", "release"):
        for node in by_kind(nodes, kind):
            assert node.inputs["packed"] == (TaskRef(corrected.id, "packed"),)


def test_corrections_of_one_model_share_its_statistics():
    base = recipe("ptqd-w4a8")
    one, two = nodes_of(base), nodes_of(recipe("ptqd-w4a8", "passes.correct.scale=false"))
    ids = {node.id for node in one}
    assert {node.kind for node in two if node.id not in ids} == {"correct", "evaluate", "score", "release"}
    plain = nodes_of(recipe("qdiffusion-w4a8"))
    assert {node.kind for node in plain if node.id not in ids} == {"evaluate", "score", "release"}


def test_plan_chooses_step_bits_before_rounding():
    nodes = nodes_of(recipe("ptqd-w4-mixed"))
    effects, chosen = by_kind(nodes, "step_effects"), only(nodes, "step_bits")
    assert [node.params["seeds"] for node in effects] == [
        {"first": 3_000_000, "count": 8},
        {"first": 3_000_008, "count": 8},
    ]
    assert chosen.inputs["effects"] == tuple(TaskRef(node.id, "effects") for node in effects)
    assert chosen.params == {"method": "effect", "target_mean": 6.0, "least_last": 6}
    varied = {
        name
        for unit in specs(nodes).values()
        for name, layer in unit["layers"].items()
        if layer["activation"]["bits"] is None
    }
    # the first and the last layer say their own bits
    everything = {name for unit in specs(nodes).values() for name in unit["layers"]}
    assert everything - varied == {"conv_in", "conv_out"}
    assert all(set(node.params["layers"]) == varied for node in effects)
    assert {
        unit["attentions"]["mid.attn"]["activation"]["bits"] for unit in specs(nodes).values() if unit["attentions"]
    } == {8}
    alone = nodes_of(recipe("ptqd-w4-mixed", "memory.budget_gib=1e-9"))
    untold = [node.label for node in by_kind(alone, "round") if "step_bits" not in node.inputs]
    assert untold == ["conv_in", "conv_out"]


def test_ways_to_choose_step_bits_share_the_effects():
    one = {node.id for node in nodes_of(recipe("ptqd-w4-mixed"))}
    other = nodes_of(recipe("ptqd-w4-mixed", "activations.step_bits.method=snr", "weights.bits=8"))
    assert all(node.id in one for node in by_kind(other, "step_effects"))
    assert only(other, "step_bits").id not in one


def test_exceptions_keep_the_bits_that_they_say():
    exceptions = layers(
        "[{match: up.*, activations: {bits: 6}}, {match: blocks.0.*, activations: {mode: static}}, "
        "{match: blocks.1.*, activations: {bits: null}}]"
    )
    found = layer_specs("activations.step_bits={}", exceptions)
    assert found["up.conv1"]["activation"]["bits"] == 6
    assert found["blocks.0.conv1"]["activation"]["bits"] == 8
    assert found["blocks.1.conv1"]["activation"] is None
    assert found["blocks.2.conv1"]["activation"]["bits"] is None


# --- MPQ-DM


def test_plan_allocates_bits_before_rounding_and_distils_before_packing():
    nodes = nodes_of(recipe("mpqdm-w2a4"))
    kinds = [node.kind for node in nodes]
    choice, task = only(nodes, "allocate"), only(nodes, "distill")
    measured = by_kind(nodes, "channel_errors")
    assert [item.task for item in choice.inputs["errors"]] == [node.id for node in measured]  # type: ignore[union-attr]
    stated = {"conv_in", "conv_out"}
    layers = [name for node in measured for name in node.params["layers"]]
    assert layers
    assert not stated & set(layers)
    assert all("cache_bytes" not in node.params for node in measured)
    for node in by_kind(nodes, "round"):
        own = [name for unit in node.params["units"] for name, layer in unit["layers"].items() if "allocated" in layer]
        assert set(own) <= set(layers)
        wanted = [TaskRef(choice.id, "allocation")] if own else []
        assert list(node.inputs.get("allocation", ())) == wanted
    assert kinds.index("allocate") < kinds.index("round") < kinds.index("distill") < kinds.index("pack")
    assert [item.output for item in task.inputs["states"]] == [f"state:{unit}" for unit in UNITS]  # type: ignore[union-attr]
    trajectories = {node.id: node for node in by_kind(nodes, "reference")}
    seeds = [trajectories[item.task].params for item in task.inputs["trajectories"]]  # type: ignore[union-attr]
    assert [each["seeds"]["first"] for each in seeds] == [4_000_000, 4_000_016, 4_000_032, 4_000_048]
    assert all(each["sqnr_seeds"] == each["seeds"]["count"] for each in seeds)
    assert {item.task for item in only(nodes, "pack").inputs["states"]} == {task.id}  # type: ignore[union-attr]


def test_distillation_composes_with_the_temporal_block_and_the_correction():
    nodes = nodes_of(recipe("mpqdm-w4a4", "passes.temporal={}", "passes.correct={}", "passes.reconstruct={}"))
    task = only(nodes, "distill")
    assert task.inputs["states"][0] == TaskRef(only(nodes, "temporal").id, "state")
    assert {node.id for node in by_kind(nodes, "reconstruct")} < task.sources()
    block = only(nodes, "temporal").params["layers"]
    assert all("allocated" not in layer for layer in block.values())
    assert not set(block) & {name for node in by_kind(nodes, "channel_errors") for name in node.params["layers"]}


def test_what_stands_around_frozen_codes_is_learned_when_all_bits_are_chosen():
    settings = ("passes.exceptions={choices: [5, 6, 8]}", "passes.correct={}")
    plain, nodes = (
        nodes_of(recipe("dmq-w4a6", *settings, f"passes.distill={distill}"))
        for distill in ("null", "{codes: frozen, effect: 0.5}")
    )
    kinds = [node.kind for node in nodes]
    assert kinds.index("exceptions") < kinds.index("distill") < kinds.index("pack") < kinds.index("correct")
    task = only(nodes, "distill")
    assert only(nodes, "exceptions").id in task.sources()
    # What an error at each step does to the final sample was measured for the choices already.
    assert [node.id for node in by_kind(nodes, "step_gains")] == [node.id for node in by_kind(plain, "step_gains")]
    learned = only(nodes_of(recipe("dmq-w4a6", *settings, "passes.distill={}")), "distill")
    assert only(nodes, "exceptions").id not in learned.sources()
    assert task.work < learned.work
    assert task.resources.memory_bytes < learned.resources.memory_bytes
    assert {"rank", "lr", "norm_lr"} & task.params.keys() == {"norm_lr"}
    assert {"rank", "lr", "norm_lr", "codes"} & learned.params.keys() == {"rank", "lr"}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("passes.allocate.extra=0.1", {"allocate", *AFTER_ROUND, "distill"}),
        ("passes.allocate.method=kurtosis", {"allocate", *AFTER_ROUND, "distill"}),
        ("passes.allocate.samples=4", {"channel_errors", "allocate", *AFTER_ROUND, "distill"}),
        ("passes.distill.relations=false", {"distill", "pack", "evaluate", "score", "release"}),
        ("passes.distill.seeds=32", {"distill", "pack", "evaluate", "score", "release"}),
    ],
)
def test_ways_to_allocate_and_distil_share_what_they_can(override: str, changed: set[str]):
    before = {node.id for node in nodes_of(recipe("mpqdm-w4a4"))}
    found = {node.kind for node in nodes_of(recipe("mpqdm-w4a4", override)) if node.id not in before}
    assert found == changed - {"reconstruct"}


def test_allocation_is_measured_with_scaled_channels():
    nodes = nodes_of(recipe("mpqdm-w4a4", "passes.scale={method: smooth}"))
    scaled = {name for node in by_kind(nodes, "scale") for name in (unit["unit"] for unit in node.params["units"])}
    for kind in ("channel_errors", "round"):
        for node in by_kind(nodes, kind):
            told = [each.output for each in node.inputs["factors"]]
            assert told == [f"factors:{unit['unit']}" for unit in node.params["units"]]
    assert scaled == {unit["unit"] for node in by_kind(nodes, "round") for unit in node.params["units"]}
    plain = by_kind(nodes_of(recipe("mpqdm-w4a4", "passes.scale=null")), "channel_errors")
    assert plain
    assert not any("factors" in node.inputs for node in plain)


def test_uniform_allocation_and_stated_bits_need_no_measurement():
    for override in ("passes.allocate.method=uniform", "layers=[{match: '*', weights: {bits: 4}}]"):
        nodes = nodes_of(recipe("mpqdm-w4a4", override))
        assert not by_kind(nodes, "channel_errors")
        assert not by_kind(nodes, "allocate")
        assert all("allocation" not in node.inputs for node in by_kind(nodes, "round"))


def test_budget_counts_the_extra_channels():
    with pytest.raises(RecipeError, match="smallest that this recipe's bits can meet"):
        nodes_of(recipe("mpqdm-w4a4-plus", layers("[]"), "budget.weight_bits_mean=4.05"))
    assert nodes_of(recipe("mpqdm-w4a4-plus", layers("[]"), "budget.weight_bits_mean=4.11"))


@pytest.mark.parametrize("override", ["weights.bits=8", "weights.bits=6", "weights={granularity: per_tensor}"])
def test_allocation_needs_room_for_a_bit_more_and_scales_of_channels(override: str):
    with pytest.raises(RecipeError, match=r"passes\.allocate: got weights of"):
        recipe("mpqdm-w4a4", override)
