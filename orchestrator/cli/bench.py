"""`quantmill bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from orchestrator.actions.bench import BenchOptions, bench_layers, bench_release, publish_bench
from orchestrator.cli.app import App, Command, pass_app
from orchestrator.text import table
from quant_spec.enums import KernelBackend
from quant_spec.keys import canonical_json
from quant_spec.numbers import human_bytes
from quant_spec.tasks.bench import BENCHED, BY_BLOCK, GRAPH

_HEADS = ("RELEASE", "FP32", "BF16", "BF16 COMPILED")


@click.command(cls=Command)
@click.argument("ref")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; all that this process may use by default.")
@click.option(
    "--backend",
    type=click.Choice([each.value for each in KernelBackend]),
    default="auto",
    show_default=True,
    help="The release's.",
)
@click.option("--compile/--no-compile", "compiled", default=True, help="Measure the compiled original too (minutes).")
@click.option("--publish", "publishes", is_flag=True, help="Publish the next version, with the result in its card.")
@click.option("--layers", is_flag=True, help="Time each layer in each format instead, for a search's latency_table.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File for the table of --layers.")
@pass_app
def bench(
    app: App,
    ref: str,
    device: str,
    threads: int | None,
    backend: str,
    compiled: bool,
    publishes: bool,
    layers: bool,
    out: Path | None,
) -> None:
    """Measure a release and its original (float32, bfloat16, compiled), in one run on the device at hand.

    On a GPU all are called from CUDA graphs, and what is compiled are the blocks that the original repeats.
    """
    if layers != (out is not None):
        raise click.UsageError("got one of --layers and --out, wanted both or none")
    with app.service() as service:
        if out is not None:
            options = BenchOptions(device, threads, KernelBackend(backend))
            table_of_layers = bench_layers(service, ref, options, notify=app.notify)
            out.write_text(canonical_json(table_of_layers) + "\n", encoding="utf-8")
            app.answer({**table_of_layers, "file": str(out)}, lambda: f"{len(table_of_layers['layers'])} layers: {out}")
            return
        found = bench_release(
            service, ref, BenchOptions(device, threads, KernelBackend(backend), compiled), notify=app.notify
        )
        if publishes:
            found["published"] = publish_bench(service, found)
    app.answer(found, lambda: bench_text(found))


def bench_text(found: dict[str, Any]) -> str:
    """Return what was measured as a table for people; `found` as of `bench_release`."""
    measured = {
        head: found[side] for head, side in zip(_HEADS, BENCHED.values(), strict=True) if found[side] is not None
    }
    sides = list(measured.values())
    rows = [
        (f"one step, batch {batch}{said}", *(_time(side[times], batch) for side in sides))
        for times, said in (("step_ms", ""), ("eager_step_ms", ", without a graph"))
        for batch in sides[0][times] or ()
    ]
    rows += [
        ("images per second", *(f"{side['images_per_second']:.2f}" for side in sides)),
        ("peak memory", *(_peak(side) for side in sides)),
        ("size", *(human_bytes(side["bytes"]) for side in sides)),
    ]
    layers = ", ".join(f"{count} layers {backend}" for backend, count in found["layers"].items())
    how = ", called from CUDA graphs" if found["way"] == GRAPH else ""
    how += ", compiled by repeated block" if found["compiled_way"] == BY_BLOCK else ""
    where = f"{found['release']} on {found['device']}, {found['threads']} threads"
    lines = [
        f"{where}, {found['backend']} backend ({layers}){how}",
        "",
        table(("", *measured), rows),
    ]
    if "published" in found:
        lines += ["", f"{found['published']} has this in its card"]
    return "\n".join(lines)


def _time(milliseconds: dict[str, float] | None, batch: str) -> str:
    return "-" if milliseconds is None else f"{milliseconds[batch]:.2f} ms"


def _peak(side: dict[str, Any]) -> str:
    return "-" if side["peak_memory_bytes"] is None else human_bytes(side["peak_memory_bytes"])
