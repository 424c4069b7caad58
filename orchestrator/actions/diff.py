"""Comparing two releases: their metrics, their recipes, and the bits of their layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.actions.releases import get_release, read_release_json, release_home
from orchestrator.service import Service
from quant_spec.layer_bits import LayerBits, layer_bits
from quant_spec.metrics import numbers
from quant_spec.quantization_config import parse_quantization_config
from workers.storage.store import Store

#: Keys of a recipe that do not change what it makes, and so are no difference.
_NAMING_KEYS = ("name", "description")


def compare_releases(service: Service, ref_a: str, ref_b: str) -> dict[str, Any]:
    """Return two releases' numbers, recipes and bits of each layer, where they differ.

    Returns
    -------
    dict
        `a`, `b`: "name@N"; `metrics`: name to {a, b}; `recipe`: dotted key to {a, b}, only what differs; `layers`: list
        of {layer, a, b}, only what differs: null for a layer in full precision, or else as `LayerBits.to_json` has it:
        {weights, activations} with the mean bits, `mixture` or `step_bits` where channels or steps differ.
    """
    sides = {"a": get_release(service, ref_a), "b": get_release(service, ref_b)}
    recipes = {side: _flat(read_release_json(service.store, row.digest, "recipe.json")) for side, row in sides.items()}
    bits = {
        side: {name: each.to_json() for name, each in release_bits(service.store, row.digest).items()}
        for side, row in sides.items()
    }
    metrics = {side: numbers(row.metrics) for side, row in sides.items()}
    return {
        "a": sides["a"].ref,
        "b": sides["b"].ref,
        "same_bytes": sides["a"].digest == sides["b"].digest,
        "metrics": {name: _pair(metrics, name) for name in _keys(metrics)},
        "recipe": {
            name: _pair(recipes, name)
            for name in _keys(recipes)
            if name not in _NAMING_KEYS and _differs(recipes, name)
        },
        "layers": [{"layer": name, **_pair(bits, name)} for name in _keys(bits) if _differs(bits, name)],
    }


def release_bits(store: Store, digest: str) -> dict[str, LayerBits]:
    """Return the bits that a release has its layers in, without those in full precision.

    Raises
    ------
    QuantizationError
        If its `quantization_config` is of a version that this Quantmill cannot read.
    """
    config = read_release_json(store, digest, f"{release_home(store, digest)}config.json")
    return layer_bits(parse_quantization_config(config["quantization_config"]))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _keys(sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list({**sides["a"], **sides["b"]})


def _pair(sides: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {"a": sides["a"].get(key), "b": sides["b"].get(key)}


def _differs(sides: Mapping[str, Mapping[str, Any]], key: str) -> bool:
    pair = _pair(sides, key)
    return bool(pair["a"] != pair["b"])
