"""The table of docs/metrics.md; `python -m quant_spec.metrics_page docs/metrics.md` writes it anew in its place."""

from __future__ import annotations

import sys
from pathlib import Path

from quant_spec.generated_table import rewrite
from quant_spec.metrics import METRICS, Direction, Metric


def reference_table() -> str:
    """Return every metric with what it means, as Markdown."""
    rows = ["| metric | unit | better | required | shown in | meaning |", "|---|---|---|---|---|---|"]
    for name, metric in METRICS.items():
        cells = (
            f"`{name}`",
            metric.unit or "–",
            "–" if metric.direction is Direction.NEITHER else metric.direction,
            "yes" if metric.is_required else "no",
            ", ".join(_places(metric)) or "–",
            f"{metric.meaning}.",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _places(metric: Metric) -> list[str]:
    """Return where a metric is found, in words."""
    listed = [f"{listing}'s protocol" for listing in sorted(metric.listed)]
    return [*metric.places, *listed, *(["artifacts diff"] if metric.is_number else [])]


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]), reference_table())
