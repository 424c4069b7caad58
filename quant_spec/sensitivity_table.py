"""Tables of sensitivities (`quant_spec.tasks.sensitivity`): merged over groups, and the keys of their entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quant_spec.allocation import LayerChoice


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
