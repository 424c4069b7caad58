"""The table of docs/metrics.md; `python -m quant_spec.metrics_page docs/metrics.md` writes it anew in its place."""

from __future__ import annotations

import sys
from pathlib import Path

from quant_spec.metrics import METRICS, Direction, Metric

BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"


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


def updated(page: str) -> str:
    """Return a page with the table as it is now between its markers; ValueError if it lacks one of them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"page: got none of {BEGIN} or {END}, wanted both")
    return f"{before}{BEGIN}\n\n{reference_table()}\n\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
