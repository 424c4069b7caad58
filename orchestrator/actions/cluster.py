"""What people are told of clusters: GPUs in use, nodes left out, and where the tasks of a job ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quant_spec.numbers import human_bytes


def gpu_text(cluster: Mapping[str, Any]) -> str:
    """Return GPUs busy, their memory in use and tasks per GPU in a few words; "" where there are no GPUs."""
    nodes = [node for node in cluster.get("nodes", ()) if node["gpus"] and not node["left_out"]]
    gpus = sum(node["gpus"] for node in nodes)
    if not gpus:
        return ""
    busy = sum(node["gpus_busy"] for node in nodes)
    tasks = sum(node["gpu_tasks"] for node in nodes)
    used = sum(node["gpu_share_used"] * node["gpu_memory_bytes"] for node in nodes)
    total = sum(node["gpus"] * node["gpu_memory_bytes"] for node in nodes)
    memory = f", {human_bytes(int(used))} of {human_bytes(total)} given out" if total else ""
    return f"GPUs {busy}/{gpus} busy{memory}" + (f", {tasks / busy:.1f} tasks per GPU" if busy else "")


def left_out(clusters: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return why nodes, or their GPUs, are not used, one line each."""
    lines = [node["left_out"] for cluster in clusters for node in cluster.get("nodes", ()) if node["left_out"]]
    return sorted(set(lines))


def ran_lines(ran: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return where tasks ran, a line for each node and device: how many of which kinds."""
    places: dict[tuple[str, str], Counter[str]] = {}
    for task in ran:
        if not task["cached"]:
            places.setdefault((task["node"] or "?", task["device"] or task["state"]), Counter())[task["kind"]] += 1
    return [
        f"{node} {device}: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
        for (node, device), kinds in sorted(places.items())
    ]
