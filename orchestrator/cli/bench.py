"""`quantmill bench`."""

from __future__ import annotations

from typing import Any

import click

from orchestrator.bench import bench_release
from orchestrator.cli.app import App, Command, pass_app
from orchestrator.text import human_bytes, table


@click.command(cls=Command)
@click.argument("ref")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; all that this process may use by default.")
@pass_app
def bench(app: App, ref: str, device: str, threads: int | None) -> None:
    """Measure a release and its full-precision original, in one run on the device at hand."""
    with app.service() as service:
        found = bench_release(service, ref, device=device, threads=threads, tell=app.tell)
    app.answer(found, lambda: _text(found))


def _text(found: dict[str, Any]) -> str:
    ours, original, ratio = found["release_figures"], found["original_figures"], found["ratios"]
    rows = [
        (
            f"one step, batch {batch}",
            f"{ours['step_ms'][batch]:.2f} ms",
            f"{original['step_ms'][batch]:.2f} ms",
            f"{ratio['step_ms'][batch]:.2f}x",
        )
        for batch in ours["step_ms"]
    ]
    rows += [
        (
            "images per second",
            f"{ours['images_per_second']:.2f}",
            f"{original['images_per_second']:.2f}",
            f"{ratio['images_per_second']:.2f}x",
        ),
        (
            "peak memory",
            human_bytes(ours["peak_memory_bytes"]),
            human_bytes(original["peak_memory_bytes"]),
            f"{ratio['peak_memory_bytes']:.2f}x",
        ),
        ("size", human_bytes(ours["bytes"]), human_bytes(original["bytes"]), f"{ratio['bytes']:.2f}x"),
    ]
    head = f"{found['release']} on {found['device']}, {found['threads']} threads, {found['backend']} backend"
    return f"{head}\n\n" + table(("", "RELEASE", "FP32", "RATIO"), rows)
