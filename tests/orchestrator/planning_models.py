"""Models for planning: inspections as `quant_core.inspect.inspection` writes them; and what tests ask of plans."""

from __future__ import annotations

from typing import Any

from orchestrator.db.rows import ModelRow
from orchestrator.graph import TaskNode
from orchestrator.planning.planner import plan
from orchestrator.recipes.load import load_recipe
from quant_spec.recipe import Recipe

#: Of `inspection()`.
UNITS = ["time_embedding", "conv_in", *(f"blocks.{i}" for i in range(4)), "mid.attn", "up", "conv_out"]
#: Kinds of tasks that rounding otherwise changes.
AFTER_ROUND = {"round", "reconstruct", "pack", "evaluate", "score", "release"}


def inspection(blocks: int = 4, channels: int = 16, side: int = 8, *, timed: bool = False) -> dict[str, Any]:
    """Describe a small UNet: timestep embedding, conv_in, blocks of two convolutions, one attention, conv_out.

    With `timed`, each block has a projection of the timestep embedding between its convolutions.
    """
    pixels = side * side
    layers: dict[str, dict[str, Any]] = {}
    units: list[dict[str, Any]] = []
    total = 0

    def add_unit(name: str, shapes: dict[str, tuple[str, list[int], list[int] | None]], attentions: list[str]) -> None:
        nonlocal total
        macs = hessian = weights = 0
        for layer, (kind, shape, split) in shapes.items():
            size, columns = 1, 1
            for dimension in shape:
                size *= dimension
            columns = size // shape[0]
            layer_macs = size * (1 if "time" in layer else pixels)
            layers[layer] = {"type": kind, "shape": shape, "macs": layer_macs, "split": split}
            macs, hessian, weights = macs + layer_macs, hessian + 4 * columns**2, weights + size
        macs += len(attentions) * 2 * pixels**2 * channels
        total += macs
        units.append(
            {
                "name": name,
                "layers": list(shapes),
                "attention": attentions,
                "gmacs": macs / 1e9,
                "weights": weights,
                "input_bytes": 4 * channels * pixels,
                "output_bytes": 4 * channels * pixels,
                "hessian_bytes": hessian,
                "done": total,
            }
        )

    hidden = ("Conv2d", [channels, channels, 3, 3], None)
    linear = ("Linear", [channels, channels], None)
    add_unit("time_embedding", {"time_embedding.linear_1": linear, "time_embedding.linear_2": linear}, [])
    add_unit("conv_in", {"conv_in": ("Conv2d", [channels, 3, 3, 3], None)}, [])
    for block in range(blocks):
        projection = {f"blocks.{block}.time_emb_proj": linear} if timed else {}
        shapes = {f"blocks.{block}.conv1": hidden, **projection, f"blocks.{block}.conv2": hidden}
        add_unit(f"blocks.{block}", shapes, [])
    add_unit("mid.attn", {f"mid.attn.{part}": linear for part in ("to_q", "to_k", "to_v", "to_out.0")}, ["mid.attn"])
    split = ("Conv2d", [channels, 2 * channels, 1, 1], [channels, channels])
    add_unit("up", {"up.conv1": hidden, "up.conv_shortcut": split}, [])
    add_unit("conv_out", {"conv_out": ("Conv2d", [3, channels, 3, 3], None)}, [])
    for unit in units:
        unit["depth"] = unit.pop("done") / total
    parameters = sum(unit["weights"] for unit in units)
    return {
        "class_name": "UNet2DModel",
        "parameters": parameters,
        "weights_bytes": 4 * parameters,
        "sample_shape": [3, side, side],
        "forward_gmacs": total / 1e9,
        "activation_bytes": 4 * channels * pixels * len(layers),
        "conditioning": {"class_labels": 9},
        "units": units,
        "layers": layers,
        "attentions": {"mid.attn": {"macs": 2 * pixels**2 * channels}},
        "unused": [],
        "temporal": {
            "time_embedding.linear_1": {"sources": [], "conditions": [], "is_feature": False},
            "time_embedding.linear_2": {"sources": ["time_embedding.linear_1"], "conditions": [], "is_feature": False},
            **{
                f"blocks.{block}.time_emb_proj": {
                    "sources": ["time_embedding.linear_2"],
                    "conditions": ["class_labels"],
                    "is_feature": True,
                }
                for block in range(blocks if timed else 0)
            },
        },
        "scheduler": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"},
        "samples": "pixels",
        "has_tokens": False,
        "missing_conditioning": [],
        "null_conditioning": ["class_labels"],
        "label_count": 10,
    }


def model(data: dict[str, Any] | None = None, *, name: str = "tiny", digest: str = "a" * 64) -> ModelRow:
    """Return a registered model with an inspection."""
    data = inspection() if data is None else data
    return ModelRow(name, digest, data["class_name"], "/models/tiny", data["weights_bytes"], data["parameters"], data)


def recipe(name: str = "base", *overrides: str) -> Recipe:
    return load_recipe(name, overrides).recipe


def layers(text: str) -> str:
    return f"layers={text}"


def nodes_of(recipe_: Recipe, row: ModelRow | None = None, **options: Any) -> list[TaskNode]:
    return list(plan(row or model(), recipe_, **options)[0])


def by_kind(nodes: list[TaskNode], kind: str) -> list[TaskNode]:
    return [node for node in nodes if node.kind == kind]


def only(nodes: list[TaskNode], kind: str) -> TaskNode:
    (node,) = by_kind(nodes, kind)
    return node


def specs(nodes: list[TaskNode]) -> dict[str, dict[str, Any]]:
    """Return what round tasks are told about each unit."""
    return {unit["unit"]: unit for node in by_kind(nodes, "round") for unit in node.params["units"]}


def layer_specs(*overrides: str) -> dict[str, Any]:
    units = specs(nodes_of(recipe("base", *overrides))).values()
    return {name: spec for unit in units for name, spec in unit["layers"].items()}
