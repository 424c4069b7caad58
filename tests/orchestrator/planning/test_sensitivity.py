"""The graph of sensitivities, run on the shipped digits model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.db.rows import ModelRow
from orchestrator.errors import RecipeError
from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.planner import plan
from orchestrator.planning.sensitivity import SensitivityOptions, plan_sensitivity
from orchestrator.recipes.load import load_recipe
from quant_core.artifact.folder import WEIGHTS_FILE
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.inspect.inspection import inspect_model
from quant_core.search.price import price
from quant_core.search.space import Costs
from quant_spec.allocation import Allocation, LayerChoice, apply_allocation
from quant_spec.errors import InvalidInputError
from quant_spec.passes.menu import Menu
from quant_spec.recipe import Recipe
from quant_spec.sensitivity_table import merge_tables
from workers.execution.execute import TaskCall, execute_call
from workers.storage.manifest import pull_tree
from workers.storage.model_folder import import_model
from workers.storage.store import NodeStore, open_cached

DIGITS = Path(__file__).parents[3] / "examples" / "models" / "digits"
WIDTHS = (2, 4, 8)
MENU = Menu(weight_bits=WIDTHS, activation_bits=(4,))
OPTIONS = SensitivityOptions(widths=MENU, step_ranges=3, promoted=(0.5,), path=1, rows=3)
SMALL = (
    *("sampler.num_inference_steps=3", "calibration={seeds: 2, shard_seeds: 2, batch_size: 8}"),
    *("weights={granularity: per_channel, group_size: null, range: minmax}", "passes.round.positions=4"),
    "layers=[]",
)


class World:
    """A store with the digits model, and tasks that run here, each once."""

    def __init__(self, folder: Path) -> None:
        (folder / "store").mkdir()
        self.store: NodeStore = open_cached(str(folder / "store"), folder / "cache")
        self.cache = str(folder / "cache")
        inspected = inspect_model(load_denoiser(DIGITS))
        digest = import_model(self.store, DIGITS).digest
        self.model = ModelRow("digits", digest, "UNet2DModel", str(DIGITS), 4, inspected["parameters"], inspected)
        self.made: dict[str, dict[str, str]] = {}

    def run(self, nodes: Iterable[TaskNode]) -> None:
        for node in nodes:
            if node.id in self.made:
                continue
            inputs = {name: [self.digest(item) for item in items] for name, items in node.inputs.items()}
            call = TaskCall(node.kind, dict(node.params), inputs, self.store.url, self.cache)
            self.made[node.id] = dict(execute_call(call).outputs)

    def digest(self, item: str | TaskRef) -> str:
        return self.made[item.task][item.output] if isinstance(item, TaskRef) else item

    def table(self, recipe: Recipe, options: SensitivityOptions) -> dict[str, Any]:
        made = plan_sensitivity(self.model, recipe, options)
        self.run(made.nodes)
        return merge_tables([json.loads(self.store.get_bytes(self.digest(table))) for table in made.tables])

    def packed_bytes(self, recipe: Recipe, folder: Path) -> int:
        nodes = list(plan(self.model, recipe)[0])
        until = next(place for place, node in enumerate(nodes) if node.kind == "pack")
        self.run(nodes[: until + 1])
        pull_tree(self.store, self.made[nodes[until].id]["packed"], folder)
        return (folder / WEIGHTS_FILE).stat().st_size


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def base(*overrides: str) -> Recipe:
    return load_recipe("fast-w4a8", [*SMALL, "attention.mode=per_step", *overrides]).recipe


def defaults(table: dict[str, Any]) -> dict[str, LayerChoice]:
    """Return what the base recipe says of each layer."""
    return {
        name: LayerChoice(weight_bits=4 if entry["weights"] else None, activation_bits=8)
        for name, entry in table["layers"].items()
    }


@pytest.fixture(scope="module")
def table(world: World) -> dict[str, Any]:
    return world.table(base(), OPTIONS)


def test_every_layer_and_attention_has_every_choice(world: World, table: dict[str, Any]) -> None:
    inspected = world.model.inspection
    assert table["layers"].keys() == inspected["layers"].keys() | inspected["attentions"].keys()
    assert table["unit"].keys() == table["layers"].keys()
    for name, entry in table["layers"].items():
        assert list(entry["activations"]) == ["4", "8"]
        assert {len(ranges) for ranges in entry["activations"].values()} == {3}
        if name in inspected["layers"]:
            halves = ["2", "2+0.5", "4", "4+0.5", "8"]  # conv_out has one channel
            assert list(entry["weights"]) == (list(map(str, WIDTHS)) if name == "conv_out" else halves)
            assert entry["keep"]["damage"] == 0
        else:
            assert entry["weights"] == {}


def test_more_bits_do_less_damage_and_take_more_bytes(table: dict[str, Any]) -> None:
    weights = [entry["weights"] for entry in table["layers"].values() if entry["weights"]]
    for choices in weights:
        damages = [choices[width]["damage"] for width in ("2", "4", "8")]
        assert damages == sorted(damages, reverse=True)
        assert choices.get("4+0.5", choices["8"])["damage"] < choices["4"]["damage"]
        sizes = [choices[str(width)]["bytes"] for width in WIDTHS]
        assert sizes == sorted(sizes)
    coarse, fine = (sum(sum(e["activations"][bits]) for e in table["layers"].values()) for bits in ("4", "8"))
    assert coarse > 50 * fine


def test_damages_of_a_unit_add_up_to_what_it_does_alone(world: World, table: dict[str, Any]) -> None:
    nodes = plan_sensitivity(world.model, base(), OPTIONS).nodes
    (gains,) = (world.made[node.id]["gains"] for node in nodes if node.kind == "step_gains")
    alone = json.loads(world.store.get_bytes(gains))["units"]
    sums = dict.fromkeys(alone, 0.0)
    for name, entry in table["layers"].items():
        if entry["weights"]:
            sums[table["unit"][name]] += entry["weights"]["4"]["damage"]  # the middle width
    assert sums == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_those_of_the_packed_file(world: World, table: dict[str, Any], tmp_path: Path, seed: int) -> None:
    """Never below, and above by a few bytes of each tensor's entry in the header."""
    choices: dict[str, LayerChoice] = {}
    for place, (name, entry) in enumerate(table["layers"].items()):
        width, _, share = list(entry["weights"] or ["8"])[(place * 3 + seed) % max(1, len(entry["weights"]))].partition(
            "+"
        )
        if not entry["weights"] or (place + seed) % 5 == 0:
            continue
        choices[name] = LayerChoice(weight_bits=int(width), promoted=float(share or 0))  # type: ignore[arg-type]
        if (place + seed) % 11 == 3 and "attentions" not in name:
            choices[name] = LayerChoice(keep=True)
    allocation = Allocation(layers=choices)
    told = price(table, allocation, Costs(base=defaults(table))).uses["bytes"]
    real = world.packed_bytes(apply_allocation(base(), allocation, MENU), tmp_path / "packed")
    assert real <= told <= real + 0.01 * real


def test_damage_depends_on_what_else_is_quantized(world: World, table: dict[str, Any]) -> None:
    alone = world.table(base(), SensitivityOptions(widths=MENU, path=0, rows=3))
    differ = [
        name
        for name, entry in table["layers"].items()
        if entry["weights"] and entry["weights"]["4"]["damage"] != alone["layers"][name]["weights"]["4"]["damage"]
    ]
    assert len(differ) > 0.9 * sum(bool(entry["weights"]) for entry in table["layers"].values())


def test_the_same_again_is_the_same_table(world: World, table: dict[str, Any]) -> None:
    nodes = plan_sensitivity(world.model, base(), OPTIONS).nodes
    for kind in ("step_gains", "sensitivity"):
        node = next(node for node in reversed(nodes) if node.kind == kind)
        before = world.made.pop(node.id)
        world.run([node])
        assert world.made[node.id] == before


@pytest.mark.slow
def test_fixed_layers_have_their_own_width_alone(world: World) -> None:
    options = SensitivityOptions(widths=MENU, fixed=("conv_*",), rows=1, path=0)
    layers = world.table(base(), options)["layers"]
    assert list(layers["conv_in"]["weights"]) == list(layers["conv_out"]["weights"]) == ["4"]
    assert len(layers["mid_block.resnets.0.conv1"]["weights"]) == len(WIDTHS)


@pytest.mark.slow
def test_scaled_channels_and_a_temporal_block_are_priced_too(world: World, tmp_path: Path) -> None:
    recipe = base("passes.scale={method: smooth}", "passes.temporal={method: closed_form}")
    few = Menu(weight_bits=(4, 8), activation_bits=(4,))
    found = world.table(recipe, SensitivityOptions(widths=few, rows=1, path=1))
    block = set(world.model.inspection["temporal"])
    assert not block & found["layers"].keys()
    assert found["layers"].keys() | block == (
        world.model.inspection["layers"].keys() | world.model.inspection["attentions"].keys()
    )
    damages = [entry["weights"]["4"]["damage"] for entry in found["layers"].values() if entry["weights"]]
    assert min(damages) > 0
    assert sum(damages) < 1
    allocation = Allocation(layers={"conv_in": LayerChoice(weight_bits=8)})
    told = price(found, allocation, Costs(base=defaults(found))).uses["bytes"]
    real = world.packed_bytes(apply_allocation(recipe, allocation, few), tmp_path / "packed")
    assert real <= told <= real + 0.01 * real


def test_ranges_of_steps_need_activations_per_step(world: World) -> None:
    with pytest.raises(RecipeError, match=r"step_ranges: got 3 with activations\.mode static, wanted per_step"):
        plan_sensitivity(world.model, base("activations.mode=static"), OPTIONS)
    with pytest.raises(RecipeError, match=r"step_ranges: got 3 with attention\.mode dynamic_token, wanted per_step"):
        plan_sensitivity(world.model, base("attention.mode=dynamic_token"), OPTIONS)


def test_a_recipe_that_chooses_bits_by_itself_is_refused(world: World) -> None:
    with pytest.raises(InvalidInputError, match=r"passes\.menu: got it beside passes\.allocate"):
        plan_sensitivity(world.model, base("passes.allocate={}"), OPTIONS)
