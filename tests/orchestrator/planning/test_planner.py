"""The planner: which tasks there are, what they are told, and what recipes share."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.costs import GIB, WORKER_BYTES, Cost, Costs
from orchestrator.planning.draft import Draft
from orchestrator.planning.formats import QuantizedUnit
from orchestrator.planning.groups import LEAST_DEPTH, OWN_WORK, unit_groups
from orchestrator.planning.model import ModelInfo
from orchestrator.planning.passes.temporal import TEMPORAL_UNIT
from orchestrator.planning.pipeline import with_guidance
from orchestrator.planning.planner import plan
from orchestrator.recipes.files import shipped_names
from orchestrator.recipes.load import load_recipe, resolve
from quant_spec.keys import canonical_json
from quant_spec.kinds import KINDS
from quant_spec.passes.table import ALWAYS, COMPONENTS, PASSES, STEP_BITS, kinds_of
from quant_spec.recipe import Passes
from quant_spec.tasks.round import Params as RoundParams
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
from workers.execution.cluster import CUDA_CONTEXT_BYTES

ROOT = Path(__file__).parents[3]
#: Shipped recipes for a bare denoiser: others name components of a pipeline.
BARE = [name for name in shipped_names() if not load_recipe(name).recipe.components]


# --- the graph


@pytest.mark.parametrize("name", BARE)
def test_plan_is_in_dependency_order_and_ends_in_the_target(name: str):
    stream, target = plan(model(), recipe(name))
    seen: set[str] = set()
    for node in stream:
        assert node.sources() <= seen
        assert node.id not in seen
        seen.add(node.id)
        assert node.kind in KINDS
        assert node.version == KINDS[node.kind].version
        assert node.label
        assert node.work >= 0
        assert node.resources.cpus == 1
        assert node.resources.gpus == 0
        assert node.resources.memory_bytes >= WORKER_BYTES
        last = node
    assert last == target
    assert target.kind == "release"


@pytest.mark.parametrize("name", BARE)
def test_plan_every_task_is_needed_and_every_reference_names_an_output(name: str):
    nodes = nodes_of(recipe(name))
    index = {node.id: node for node in nodes}
    used: set[str] = set()
    for node in nodes:
        for item in (item for items in node.inputs.values() for item in items):
            if isinstance(item, TaskRef):
                source = index[item.task]
                KINDS[source.kind].check_outputs([item.output])
                if ":" in item.output:
                    told = [unit["unit"] for unit in source.params["units"]] if "units" in source.params else UNITS
                    told = [*told, TEMPORAL_UNIT] if source.kind == "differences" else told
                    assert item.output.rpartition(":")[2] in told
                used.add(item.task)
            else:
                assert item == "a" * 64
    assert used == set(index) - {nodes[-1].id}


@pytest.mark.parametrize("name", BARE)
def test_plan_every_task_is_told_what_its_kind_reads(name: str):
    for node in nodes_of(recipe(name), model(inspection(timed=True))):
        kind = KINDS[node.kind]
        told = json.loads(json.dumps(node.params))
        assert kind.params.from_json(told).to_json() == told == node.params
        assert kind.inputs.from_json(node.inputs).to_json() == node.inputs


@pytest.mark.parametrize("name", BARE)
def test_plan_has_the_kinds_that_the_table_of_passes_says(name: str):
    """What releases record as the versions that they depend on."""
    chosen = recipe(name)
    kinds = {node.kind for node in nodes_of(chosen, model(inspection(timed=True)))}
    said = kinds_of(json.loads(resolve(chosen).json))
    assert len(set(said)) == len(said)
    assert kinds == set(said) - ({"reconstruct"} if chosen.passes.reconstruct is None else set())


def test_table_of_passes_names_the_passes_of_a_recipe_and_kinds():
    assert list(PASSES) == list(Passes.model_fields)
    assert {*ALWAYS, *STEP_BITS, *COMPONENTS, *(kind for kinds in PASSES.values() for kind in kinds)} <= set(KINDS)
    assert kinds_of({}) == ALWAYS


def test_plan_without_reconstruction_packs_rounded_states():
    nodes = nodes_of(recipe("fast-w4a8"))
    assert Counter(node.kind for node in nodes) == {
        "calibrate": 2,
        "round": 1,
        "pack": 1,
        "reference": 4,
        "evaluate": 4,
        "score": 1,
        "release": 1,
    }
    assert [item.output for item in only(nodes, "pack").inputs["states"]] == [f"state:{unit}" for unit in UNITS]  # type: ignore[union-attr]


def test_plan_reconstructs_every_unit_from_its_rounded_state():
    nodes = nodes_of(recipe("qdiffusion-w4a8"))
    reconstructs = by_kind(nodes, "reconstruct")
    assert [node.label for node in reconstructs] == UNITS
    rounds = {node.id for node in by_kind(nodes, "round")}
    for node in reconstructs:
        (state,) = node.inputs["state"]
        assert isinstance(state, TaskRef)
        assert state.task in rounds
        assert state.output == f"state:{node.label}"
        assert set(node.inputs) == {"model", "calibration", "state"}
        assert not node.sources() & {other.id for other in reconstructs}
    assert only(nodes, "pack").inputs["states"] == tuple(TaskRef(node.id, "state") for node in reconstructs)


def test_plan_from_quantized_inputs_is_a_chain_of_all_earlier_states():
    nodes = nodes_of(recipe("qdiffusion-w4a8", "passes.reconstruct.inputs=quantized"))
    reconstructs = by_kind(nodes, "reconstruct")
    for place, node in enumerate(reconstructs):
        assert node.inputs.get("earlier", ()) == tuple(TaskRef(other.id, "state") for other in reconstructs[:place])


def test_plan_shards_cover_all_seeds_once():
    nodes = nodes_of(recipe("base", "calibration.seeds=37", "evaluation.seeds=100", "evaluation.sqnr_seeds=70"))
    calibrate = [node.params["seeds"] for node in by_kind(nodes, "calibrate")]
    assert calibrate == [
        {"first": 1_000_000, "count": 16},
        {"first": 1_000_016, "count": 16},
        {"first": 1_000_032, "count": 5},
    ]
    for kind in ("reference", "evaluate"):
        seeds = [node.params["seeds"] for node in by_kind(nodes, kind)]
        assert seeds == [{"first": 0, "count": 64}, {"first": 64, "count": 36}]
    assert [node.params["sqnr_seeds"] for node in by_kind(nodes, "reference")] == [64, 6]
    assert [node.params["batch_size"] for node in by_kind(nodes, "calibrate")] == [16, 16, 5]


def test_plan_pairs_each_evaluation_with_the_reference_of_its_seeds():
    nodes = nodes_of(recipe())
    index = {node.id: node for node in nodes}
    pack, score = only(nodes, "pack"), only(nodes, "score")
    for node in by_kind(nodes, "evaluate"):
        (reference,) = node.inputs["reference"]
        assert isinstance(reference, TaskRef)
        told = {name: value for name, value in node.params.items() if name != "samples"}
        recorded = index[reference.task].params["sqnr_seeds"]
        assert index[reference.task].params == {**told, "sqnr_seeds": recorded}
        assert node.inputs["packed"] == (TaskRef(pack.id, "packed"),)
    assert score.inputs["references"] == tuple(TaskRef(n.id, "reference") for n in by_kind(nodes, "reference"))
    assert score.inputs["evaluations"] == tuple(TaskRef(n.id, "evaluation") for n in by_kind(nodes, "evaluate"))
    release = nodes[-1]
    assert release.inputs["score"] == (TaskRef(score.id, "score"),)
    assert release.inputs["calibration"] == tuple(TaskRef(n.id, "calibration") for n in by_kind(nodes, "calibrate"))


def test_plan_gives_the_extractor_weights_to_score_alone():
    digest = "b" * 64
    row = recipe().model_dump(mode="json")
    row["evaluation"] |= {"extractor": "inception-v3", "extractor_weights": digest, "lpips": "c" * 64}
    from orchestrator.recipes.load import recipe_from_json

    nodes = nodes_of(recipe_from_json(row))
    assert only(nodes, "score").inputs["extractor_weights"] == (digest,)
    assert only(nodes, "score").inputs["lpips"] == ("c" * 64,)
    assert [node.kind for node in nodes if digest in canonical_json(dict(node.params))] == ["release"]


def test_plan_release_says_what_and_from_what_but_not_where():
    local, remote = model(), dataclasses.replace(model(), source="hf:owner/name@abc")
    chosen = recipe("fast-w4a8")
    params = nodes_of(chosen, local)[-1].params
    assert params["model"] == {"name": "tiny", "class_name": "UNet2DModel", "source": None}
    chosen = with_guidance(chosen, local)  # a release states what its model's pipeline decided
    assert params["recipe"] == {
        "name": "fast-w4a8",
        "digest": resolve(chosen).digest,
        "config": json.loads(resolve(chosen).json),
    }
    assert nodes_of(chosen, remote)[-1].params["model"]["source"] == "hf:owner/name@abc"


def test_plan_twice_is_the_same():
    assert nodes_of(recipe("qdiffusion-w4a8")) == nodes_of(recipe("qdiffusion-w4a8"))


def test_plan_says_of_each_task_what_it_takes_on_a_gpu_and_whether_one_helps():
    nodes = nodes_of(recipe("qdiffusion-w4a8"))
    helped = {node.kind for node in nodes if node.resources.gpu_memory_bytes}
    assert helped == {"calibrate", "round", "reconstruct", "reference", "evaluate"}
    assert {node.resources.gpus for node in nodes} == {0.0}  # none cannot do without
    for node in nodes:
        if node.kind in helped:
            assert (
                CUDA_CONTEXT_BYTES
                < node.resources.gpu_memory_bytes
                <= node.resources.memory_bytes + CUDA_CONTEXT_BYTES - WORKER_BYTES
            )


def test_plan_of_a_larger_batch_takes_more_of_a_gpu_and_a_recorded_trajectory_does_not():
    def calibrate(*overrides):
        node = next(node for node in nodes_of(recipe("qdiffusion-w4a8", *overrides)) if node.kind == "calibrate")
        return node.resources

    small, large = calibrate("calibration.batch_size=2"), calibrate("calibration.batch_size=16")
    assert large.gpu_memory_bytes > small.gpu_memory_bytes
    more = calibrate("calibration.batch_size=2", "calibration.shard_seeds=32")
    assert more.memory_bytes > small.memory_bytes
    assert more.gpu_memory_bytes == small.gpu_memory_bytes


def test_plan_names_no_task_by_where_and_how_it_runs():
    plain = nodes_of(recipe("qdiffusion-w4a8"))
    wishes = ("resources={device: cuda, gpu_type: H100, task_minutes: 5}", "deterministic=true")
    assert [node.id for node in nodes_of(recipe("qdiffusion-w4a8", *wishes))] == [node.id for node in plain]


# --- what recipes share

ALL = {"calibrate", "round", "reconstruct", "pack", "reference", "evaluate", "score", "release"}
AFTER_RECONSTRUCT = AFTER_ROUND - {"round"}
SHARING = [
    ("name=other", {"release"}),
    ("description=other", {"release"}),
    ("weights.bits=3", AFTER_ROUND),
    ("weights.range=minmax", AFTER_ROUND),
    ("activations.bits=6", AFTER_ROUND),
    ("attention.enabled=false", AFTER_ROUND),
    ("skip_split=false", AFTER_ROUND),
    ("seed=1", AFTER_ROUND),
    ("passes.round.positions=5", AFTER_ROUND),
    ("passes.round.method=nearest", AFTER_ROUND),
    ("passes.reconstruct.iterations=3", AFTER_RECONSTRUCT),
    ("passes.reconstruct.learn_activation_scales=true", AFTER_RECONSTRUCT),
    ("memory.budget_gib=1", AFTER_RECONSTRUCT),
    ("passes.reconstruct.start=nearest", AFTER_RECONSTRUCT),
    ("budget.weight_bits_mean=30", {"release"}),
    ("calibration.seeds=16", AFTER_ROUND),
    ("calibration.steps=20", {"release"}),
    ("calibration.first_seed=2000000", ALL - {"reference"}),
    ("evaluation.seeds=128", {"score", "release"}),
    ("evaluation.sqnr_seeds=16", {"reference", "evaluate", "score", "release"}),
    ("evaluation.grid=4", {"score", "release"}),
    ("evaluation.first_seed=64", {"reference", "evaluate", "score", "release"}),
    ("evaluation.batch_size=16", {"reference", "evaluate", "score", "release"}),
    ("sampler.num_inference_steps=10", ALL),
    ("sampler.eta=1", ALL),
]


@pytest.mark.parametrize(("override", "changed"), SHARING, ids=[override for override, _ in SHARING])
def test_plan_change_renames_only_what_it_can_change(override: str, changed: set[str]):
    before = {node.id for node in nodes_of(recipe("qdiffusion-w4a8"))}
    assert {node.kind for node in nodes_of(recipe("qdiffusion-w4a8", override)) if node.id not in before} == changed


def test_plan_change_of_some_layers_leaves_other_groups_alone():
    def rounds(last_bits: int) -> list[str]:
        entry = layers(
            f"[{{match: '@first', weights: {{bits: 8}}}}, {{match: '@last', weights: {{bits: {last_bits}}}}}]"
        )
        nodes = nodes_of(recipe("fast-w4a8", entry, "memory.budget_gib=1e-9"))
        return [node.id for node in by_kind(nodes, "round")]

    assert [node in rounds(8) for node in rounds(3)] == [True] * (len(UNITS) - 1) + [False]


def test_plan_shares_tasks_between_shipped_recipes():
    kinds = {"calibrate", "reference"}
    ids = {name: {node.id for node in nodes_of(recipe(name)) if node.kind in kinds} for name in BARE}
    assert all(ids["base"] <= other for other in ids.values())
    # corrections have trajectories of their own, the same ones
    assert {len(other - ids["base"]) for name, other in ids.items() if name.startswith("ptqd")} == {6}
    assert {len(other - ids["base"]) for name, other in ids.items() if name.startswith("mpqdm")} == {4}
    assert len(set().union(*ids.values()) - ids["base"]) == 6 + 4


def test_plan_other_model_shares_nothing_and_its_name_only_enters_the_release():
    before = {node.id for node in nodes_of(recipe())}
    assert not before & {node.id for node in nodes_of(recipe(), model(digest="c" * 64))}
    assert [node.kind for node in nodes_of(recipe(), model(name="other")) if node.id not in before] == ["release"]


# --- formats


def test_formats_defaults_and_ends():
    found = layer_specs("weights.bits=4", "activations.bits=6", "activations.symmetric=true")
    assert found["blocks.0.conv1"] == {
        "weight": {"bits": 4, "symmetric": False, "granularity": "per_channel", "group_size": None},
        "weight_range": {"method": "minmax"},
        "activation": {"bits": 6, "symmetric": True, "mode": "per_step"},
        "activation_range": {"method": "minmax"},
        "split": None,
    }
    eights = [name for name, spec in found.items() if spec["weight"]["bits"] == 8]
    assert (
        eights == [name for name, spec in found.items() if spec["activation"]["bits"] == 8] == ["conv_in", "conv_out"]
    )


def test_formats_range_parameters_only_where_used():
    found = layer_specs("weights.range=percentile", "activations.mode=dynamic_token", "weights.percentile=0.99")
    spec = found["up.conv1"]
    assert spec["weight_range"] == {"method": "percentile", "percentile": 0.99}
    assert spec["activation_range"] is None
    assert spec["activation"]["mode"] == "dynamic_token"


def test_formats_split_is_a_switch():
    assert layer_specs()["up.conv_shortcut"]["split"] == [16, 16]
    assert layer_specs("skip_split=false")["up.conv_shortcut"]["split"] is None


def test_formats_later_exceptions_win_field_by_field():
    entries = "[{match: '*', weights: {bits: 3}}, {match: 'blocks.*', weights: {bits: 5, symmetric: true}},"
    found = layer_specs(layers(entries + " {match: 'blocks.1.*', weights: {bits: 6}, activations: {bits: 4}}]"))
    assert found["conv_in"]["weight"]["bits"] == 3
    weights = found["blocks.0.conv1"]["weight"], found["blocks.1.conv2"]["weight"]
    assert [(w["bits"], w["symmetric"]) for w in weights] == [(5, True), (6, True)]
    assert found["blocks.1.conv1"]["activation"]["bits"] == 4
    assert found["blocks.0.conv1"]["activation"]["bits"] == 8


def test_formats_null_bits_keep_the_inputs_of_some_layers():
    found = layer_specs(layers("[{match: '*.conv1', activations: {bits: null}}]"))
    assert found["blocks.0.conv1"]["activation"] is found["blocks.0.conv1"]["activation_range"] is None
    assert found["blocks.0.conv2"]["activation"] is not None


def test_formats_weight_only_recipe_quantizes_no_activation_and_no_attention():
    units = specs(nodes_of(recipe("fast-w4a8", "activations.bits=null")))
    assert all(spec["activation"] is None for unit in units.values() for spec in unit["layers"].values())
    assert all(not unit["attentions"] for unit in units.values())


def test_formats_keep_leaves_layers_and_whole_units_out():
    entries = layers("[{match: 'blocks.0.conv1', keep: true}, {match: 'up.*', keep: true}]")
    nodes = nodes_of(recipe("qdiffusion-w8a8", entries))
    units = specs(nodes)
    assert list(units["blocks.0"]["layers"]) == ["blocks.0.conv2"]
    assert "up" not in units
    wanted = [unit for unit in UNITS if unit != "up"]
    reconstructs = by_kind(nodes, "reconstruct")
    assert [node.label for node in reconstructs] == wanted
    assert only(nodes, "pack").inputs["states"] == tuple(TaskRef(node.id, "state") for node in reconstructs)


def test_formats_later_exception_quantizes_again():
    found = layer_specs(layers("[{match: '*', keep: true}, {match: conv_in, weights: {bits: 4}}]"))
    assert {name: spec["weight"]["bits"] for name, spec in found.items()} == {"conv_in": 4}


def test_formats_attention():
    plain = specs(nodes_of(recipe("base", "attention={mode: null, softmax_bits: 6}", "activations.bits=4")))["mid.attn"]
    assert plain["attentions"] == {
        "mid.attn": {
            "activation": {"bits": 8, "symmetric": False, "mode": "per_step"},
            "activation_range": {"method": "minmax"},
            "softmax_bits": 6,
        }
    }
    assert specs(nodes_of(recipe("base", "attention.enabled=false")))["mid.attn"]["attentions"] == {}


def test_formats_attention_whose_probabilities_are_exact_whatever_the_other_bits():
    entry = layers("[{match: mid.attn, activations: {bits: 4}}]")
    unit = specs(nodes_of(recipe("base", "attention.softmax_bits=16", entry)))["mid.attn"]
    operands = unit["attentions"]["mid.attn"]
    assert (operands["activation"]["bits"], operands["softmax_bits"]) == (4, 16)


def test_formats_attention_in_a_mode_of_its_own():
    unit = specs(nodes_of(recipe("base")))["mid.attn"]
    operands = unit["attentions"]["mid.attn"]
    assert operands["activation"]["mode"] == "dynamic_token"
    assert operands.get("activation_range") is None
    assert {layer["activation"]["mode"] for layer in unit["layers"].values()} == {"per_step"}
    chosen = [
        "attention.mode=dynamic_token", "passes.menu={weight_bits: [4, 8], activation_bits: [4]}",
        layers("[{match: mid.attn, activations: {range_bits: [4, 8]}}]"),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"attention mid\.attn: .*got attention\.mode dynamic_token, wanted per_step"):
        nodes_of(recipe("base", *chosen))


@pytest.mark.parametrize("entry", ["{match: mid.attn, keep: true}", "{match: 'mid.attn.*', keep: true}"])
def test_formats_attention_is_kept_by_its_name_or_with_all_its_layers(entry: str):
    unit = specs(nodes_of(recipe("base", layers(f"[{entry}]")))).get("mid.attn", {"attentions": {}})
    assert unit["attentions"] == {}


def test_formats_attention_stays_where_only_some_of_its_layers_are_kept():
    unit = specs(nodes_of(recipe("base", layers("[{match: mid.attn.to_q, keep: true}]"))))["mid.attn"]
    assert set(unit["attentions"]) == {"mid.attn"}
    assert set(unit["layers"]) == {"mid.attn.to_k", "mid.attn.to_v", "mid.attn.to_out.0"}


def test_formats_pattern_that_matches_nothing_is_refused_unless_it_need_not():
    with pytest.raises(
        RecipeError, match=r"^layers.0.match: got 'blocs.0.conv1', wanted a pattern that matches .*; nearest"
    ):
        nodes_of(recipe("base", layers("[{match: blocs.0.conv1, keep: true}]")))
    assert nodes_of(recipe("base", layers("[{match: 'blocs.*', keep: true, required: false}]")))


def test_formats_nothing_left_is_refused():
    with pytest.raises(RecipeError, match=r"^layers: got every layer kept in full precision, wanted"):
        plan(model(), recipe("base", layers("[{match: '*', keep: true}]")))


def test_formats_exceptions_that_only_together_contradict_are_refused():
    entries = "[{match: 'blocks.*', weights: {granularity: per_group, group_size: 8}},"
    chosen = recipe(
        "base", layers(entries + " {match: 'blocks.0.*', weights: {granularity: per_tensor, group_size: null}}]")
    )
    assert specs(nodes_of(chosen))["blocks.0"]["layers"]["blocks.0.conv1"]["weight"]["granularity"] == "per_tensor"
    grouped = recipe("base", "weights={granularity: per_group, group_size: 8}")
    bad = grouped.model_copy(
        update={"layers": recipe("base", layers("[{match: up.conv1, weights: {bits: 4}}]")).layers}
    )
    broken = bad.layers[0].weights.model_copy(update={"group_size": None})
    broken.model_fields_set.add("group_size")
    bad = bad.model_copy(update={"layers": (bad.layers[0].model_copy(update={"weights": broken}),)})
    with pytest.raises(RecipeError, match=r"^layer up.conv1: weights.group_size: got null with granularity per_group"):
        nodes_of(bad)


@pytest.mark.parametrize(
    ("sample_shape", "shapes", "wanted"),
    [
        ([3, 32, 32], [("Linear", [32, 32]), ("Conv2d", [8, 3, 3, 3]), ("Conv2d", [3, 8, 3, 3])], "l1"),
        ([4, 64], [("Linear", [8, 64]), ("Conv1d", [8, 4, 3]), ("Conv1d", [4, 8, 3])], "l1"),
        ([256, 64], [("Linear", [8, 16]), ("Linear", [8, 64]), ("Linear", [64, 8])], "l1"),
        ([4, 32, 32], [("Linear", [8, 16]), ("Linear", [8, 99])], "l0"),
    ],
)
def test_first_layer_reads_the_sample(sample_shape: list[int], shapes: list[tuple[str, list[int]]], wanted: str):
    data = inspection()
    data["sample_shape"], data["has_tokens"] = sample_shape, sample_shape == [256, 64]
    data["layers"] = {f"l{i}": {"type": k, "shape": s, "macs": 1, "split": None} for i, (k, s) in enumerate(shapes)}
    data["units"] = [{**data["units"][0], "layers": list(data["layers"])}]
    info = ModelInfo.read("a", data)
    assert info.first_layer == wanted
    assert info.last_layer == f"l{len(shapes) - 1}"


# --- groups, work, memory


def groups_of(own: float, *overrides: str) -> tuple[Draft, list[list[QuantizedUnit]]]:
    """Split the units of a model, each of which takes `own` times what one pass over the calibration set does."""
    draft = Draft.begin(model(inspection(blocks=20)), recipe("fast-w4a8", *overrides))
    costs = draft.costs

    def cost(part: Sequence[QuantizedUnit]) -> Cost:
        return Cost(costs.replay(part[-1].info.depth) + own * costs.replay() * len(part), 0)

    found = list(unit_groups(draft, draft.units, cost))
    assert [unit for group in found for unit in group] == list(draft.units)
    return draft, found


def test_a_group_ends_where_its_own_work_pays_for_the_forwards_that_reach_it():
    draft, one = groups_of(0.0)
    assert len(one) == 1
    assert len(groups_of(OWN_WORK)[1]) == len(draft.units)
    between = groups_of(0.3)[1]
    assert 1 < len(between) < len(draft.units)
    for group in between[:-1]:
        depth, before = (max(LEAST_DEPTH, unit.info.depth) for unit in (group[-1], group[-2]))
        assert 0.3 * len(group) >= OWN_WORK * depth
        assert 0.3 * (len(group) - 1) < OWN_WORK * before


def test_a_group_has_second_moments_within_the_budget():
    budget = 2.5 * groups_of(0.0)[0].units[3].info.hessian_bytes
    bounded = groups_of(0.0, f"memory.budget_gib={budget / GIB}")[1]
    assert len(bounded) > 1
    assert all(sum(unit.info.hessian_bytes for unit in group) <= budget for group in bounded)


def test_rounding_for_quantized_inputs_is_one_more_task_within_memory():
    answering = recipe("fast-w4a8", "passes.round.inputs=quantized")
    data = inspection(blocks=20)
    data["activation_bytes"] = 2**22
    nodes = nodes_of(answering, model(data))
    node = only(nodes, "answer")
    assert (node.params["samples"], node.params["positions"]) == (32, 32)
    # What is rounded before gives grids and ranges alone, whose codes are the nearest.
    assert {each.params["method"] for each in by_kind(nodes, "round")} == {"nearest"}
    states = [f"state:{unit['unit']}" for each in by_kind(nodes, "round") for unit in each.params["units"]]
    assert [source.output for source in node.inputs["states"]] == states
    assert {source.task for source in only(nodes, "pack").inputs["states"]} == {node.id}
    assert not by_kind(nodes_of(recipe("fast-w4a8"), model(data)), "answer")
    costs = Costs(ModelInfo.read("a", data), answering)
    budget = f"memory.budget_gib={8.5 * 2 * 20 * costs.live_bytes / GIB}"
    fewer = recipe("fast-w4a8", "passes.round.inputs=quantized", "passes.round.samples=8", budget)
    small = only(nodes_of(fewer, model(data)), "answer")
    assert small.resources.memory_bytes < node.resources.memory_bytes
    tight = recipe("fast-w4a8", "passes.round.inputs=quantized", budget)
    with pytest.raises(RecipeError, match=r"memory\.budget_gib: got .* quantized, wanted .* which 32 samples "):
        nodes_of(tight, model(data))


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("auto-w4a8", "choose"),
        ("dmq-w4a8", "choose"),
        ("dmq-w4a6", "exceptions"),
        ("mpqdm-w4a4", "round"),
        ("svdquant-w4a4", "round"),
        ("modiff-w4a4", "choose"),
    ],
)
def test_codes_answer_for_what_every_other_pass_leaves(name: str, last: str):
    """Scaled channels, bits of layers or of output channels, low-rank branches: the states are those of the last."""
    learned = ["passes.reconstruct.inputs=quantized"] if name.startswith("dmq") else []
    nodes = nodes_of(recipe(name, "passes.round.inputs=quantized", "memory.budget_gib=64", *learned))
    node = only(nodes, "answer")
    assert {source.task for source in node.inputs["states"]} <= {each.id for each in by_kind(nodes, last)}
    following = ["reconstruct"] if name.startswith("dmq") else ["distill"] if name.startswith("mpqdm") else []
    following += ["differences"] if name.startswith("modiff") else []
    for kind in following or ["pack"]:
        assert any(source.task == node.id for each in by_kind(nodes, kind) for source in sources(each)), kind


def test_codes_that_answer_are_not_learned_again_for_exact_inputs():
    with pytest.raises(
        RecipeError, match=r"passes\.reconstruct\.inputs: got fp beside passes\.round\.inputs quantized"
    ):
        recipe("qdiffusion-w4a8", "passes.round.inputs=quantized")


def sources(node: TaskNode) -> list[TaskRef]:
    return [each for given in node.inputs.values() for each in given if isinstance(each, TaskRef)]


def test_round_labels_name_the_run():
    assert only(nodes_of(recipe()), "round").label == "time_embedding .. conv_out"
    alone = by_kind(nodes_of(recipe("fast-w4a8", "memory.budget_gib=1e-9")), "round")
    assert [node.label for node in alone] == UNITS


def total(nodes: list[TaskNode], kind: str) -> float:
    return sum(node.work for node in by_kind(nodes, kind))


def test_work_grows_with_what_is_asked():
    base = nodes_of(recipe("qdiffusion-w4a8"))
    info = ModelInfo.read("a", inspection())
    samples = 20 * info.gmacs
    assert total(base, "calibrate") > 32 * samples
    assert total(base, "reference") > 256 * samples
    assert total(base, "evaluate") > total(base, "reference")

    def ratio(kind: str, *overrides: str) -> float:
        return total(nodes_of(recipe("qdiffusion-w4a8", *overrides)), kind) / total(base, kind)

    assert ratio("calibrate", "calibration.seeds=64") == pytest.approx(2)
    assert ratio("reference", "evaluation.seeds=512") == pytest.approx(2)
    assert ratio("calibrate", "sampler.guidance_scale=3") == pytest.approx(2)
    assert ratio("calibrate", "sampler.num_inference_steps=40") == pytest.approx(2)
    assert ratio("round", "passes.round.method=nearest") < 1
    assert 1.5 < ratio("reconstruct", "passes.reconstruct.iterations=400") < 2
    assert ratio("reconstruct", "passes.reconstruct.inputs=quantized") > 1


def test_memory_is_bounded_by_the_budget():
    data = inspection(channels=64, side=64)
    chosen = recipe("qdiffusion-w4a8", "passes.reconstruct.batch_size=1", "calibration.batch_size=1")
    large = by_kind(nodes_of(chosen, model(data)), "reconstruct")[3].resources.memory_bytes
    half = chosen.model_copy(update={"memory": chosen.memory.model_copy(update={"budget_gib": 0.25})})
    small = by_kind(nodes_of(half, model(data)), "reconstruct")[3].resources.memory_bytes
    samples = 32 * 20 * 2 * 4 * 64 * 64 * 64
    assert large - small == min(samples, 2 * 2**30) - 2**28
    costs = Costs(ModelInfo.read("a", data), chosen)
    assert costs.sampling(64, 64).memory_bytes > costs.sampling(64, 32).memory_bytes


# --- scale and hygiene


@pytest.mark.parametrize("blocks", [880, pytest.param(8800, marks=pytest.mark.slow)])
def test_plan_streams_ten_thousand_tasks(blocks):
    stream, target = plan(model(inspection(blocks=blocks)), recipe("qdiffusion-w4a8"))
    assert iter(stream) is stream
    assert sum(1 for _ in stream) > blocks
    assert target.kind == "release"


def test_plan_is_free_of_torch_and_sql():
    code = (
        "import sys, orchestrator.planning.planner, orchestrator.planning.estimate, orchestrator.recipes.json_schema;"
        "print(sorted({'torch', 'diffusers', 'numpy', 'sqlalchemy', 'ray'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_plan_real_inspection_and_what_tasks_read_of_it():
    from quant_core.diffusion.denoiser import load_denoiser
    from quant_core.inspect.inspection import inspect_model

    data = json.loads(json.dumps(inspect_model(load_denoiser(ROOT / "examples" / "models" / "emoji32"))))
    info = ModelInfo.read("a", data)
    assert (info.first_layer, info.last_layer) == ("conv_in", "conv_out")
    assert sum(layer.macs for layer in info.layers) < info.gmacs * 1e9
    assert info.units[-1].depth == pytest.approx(1)
    nodes = nodes_of(recipe("qdiffusion-w4a8"), model(data))
    assert len(by_kind(nodes, "reconstruct")) == len(data["units"])
    units = [unit for node in by_kind(nodes, "round") for unit in RoundParams.from_json(node.params).units]
    assert [unit.unit for unit in units] == [unit["name"] for unit in data["units"]]
    assert sum(len(unit.attentions) for unit in units) == len(data["attentions"]) > 0
    assert any(layer.split for unit in units for layer in unit.layers.values())
    assert nodes_of(recipe("qdiffusion-w4a8"), model(data))[-1] == nodes[-1]
