"""Tables of sensitivities (`quant_spec.tasks.sensitivity`): merged over groups, and summed over an allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.errors import InvalidInputError


def merge_tables(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one table of all groups: layers are united, `base_bytes` add up."""
    merged: dict[str, Any] = {"layers": {}, "base_bytes": 0, "unit": {}}
    for table in tables:
        merged["layers"] |= table["layers"]
        merged["unit"] |= table["unit"]
        merged["base_bytes"] += table["base_bytes"]
    return merged


def weight_key(choice: LayerChoice) -> str:
    """Return under which key a choice's damage and bytes stand."""
    return f"{choice.weight_bits}+{choice.promoted:g}" if choice.promoted else f"{choice.weight_bits}"


def predicted(table: Mapping[str, Any], allocation: Allocation, base: Mapping[str, LayerChoice]) -> dict[str, float]:
    """Return `damage` (mean square error of the final sample) and `bytes` of the packed file.

    Parameters
    ----------
    table
        Of all groups.
    allocation
        Choices; what is null in one, and layers without one, have what `base` says.
    base
        What the base recipe says of each layer and attention.

    Raises
    ------
    InvalidInputError
        If the table has no entry for a choice.
    """
    damage, size = 0.0, int(table["base_bytes"])
    for name, entry in table["layers"].items():
        choice, default = allocation.layers.get(name, LayerChoice()), base[name]
        if choice.keep or (default.keep and choice.weight_bits is None):
            size += entry["keep"]["bytes"]
            continue
        if entry["weights"]:
            key = weight_key(choice if choice.weight_bits is not None else default)
            found = _entry(entry["weights"], key, name)
            damage, size = damage + found["damage"], size + found["bytes"]
        bits = choice.activation_bits if choice.activation_bits is not None else default.activation_bits
        if bits is not None and entry["activations"]:
            ranges = len(next(iter(entry["activations"].values())))
            steps = bits if isinstance(bits, tuple) else (bits,) * ranges
            damage += sum(_entry(entry["activations"], str(b), name)[place] for place, b in enumerate(steps))
    return {"damage": damage, "bytes": size}


def _entry(entries: Mapping[str, Any], key: str, name: str) -> Any:
    if key not in entries:
        raise InvalidInputError(f"layer {name}: got {key}, wanted one of {', '.join(entries)}")
    return entries[key]
