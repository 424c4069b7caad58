"""One recipe on one device, in this process, without a database and without Ray: what each kind of task takes there.

    python -m benchmarks.device_jobs --recipe fast-w4a8 --device cuda [--model FOLDER] [--set KEY=VALUE ...]
        [--threads 8] [--out FILE]

Plans the job as `quantmill submit` does and runs its tasks one after another, in the order of the plan, with the bodies
that workers run. Prints one JSON document: the seconds of each kind of task (of the clock, and of this process's CPUs,
all threads together), the release's metrics, what the process needed before its first task (imports, a CUDA context),
and `again`: the first task of each kind of PROFILED a second time, under the profiler, with the functions that took
longest and whether its bytes came out the same. Written after each task, so that a run that is cut leaves what it has.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cli import give, keep, parser
from orchestrator.db.rows import ModelRow
from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.planner import plan
from orchestrator.recipes.load import load_recipe
from workers.execution.context import TaskOutput
from workers.execution.execute import TaskCall, execute_call
from workers.storage.model_folder import import_model, resolve_source
from workers.storage.store import open_store

#: Kinds whose first task is run again under the profiler.
PROFILED = ("calibrate", "evaluate", "score", "round")
FUNCTIONS = 12
#: Figures of a release that are recorded.
FIGURES = ("psnr_db", "psnr_db_ci95", "n", "fd", "weight_bits_mean", "bytes")


@dataclass(frozen=True, slots=True)
class Place:
    """Where tasks run: torch's name of the device, threads on the host, folder of the store and its cache."""

    device: str
    threads: int
    folder: Path

    def call(self, kind: str, params: Mapping[str, Any], inputs: Mapping[str, Sequence[str]]) -> TaskCall:
        """Return what runs a task here."""
        resolved = {name: list(digests) for name, digests in inputs.items()}
        store, cache = str(self.folder / "store"), str(self.folder / "cache")
        return TaskCall(kind, dict(params), resolved, store, cache, device=self.device, threads=self.threads)


@dataclass(slots=True)
class Spent:
    """What the tasks of one kind took, in seconds; `first` is the first one's, which warms up what it uses."""

    tasks: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    first: float = 0.0

    def add(self, seconds: float, cpu_seconds: float) -> None:
        """Count one task."""
        self.first = self.first if self.tasks else seconds
        self.tasks, self.seconds, self.cpu_seconds = (
            self.tasks + 1, self.seconds + seconds, self.cpu_seconds + cpu_seconds
        )  # fmt: skip


@dataclass(slots=True)
class Report:
    """What is printed; `finished` says that every task ran."""

    recipe: str
    device: str
    threads: int
    starting: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, Spent] = field(default_factory=dict)
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    again: dict[str, Any] = field(default_factory=dict)
    finished: bool = False


def start(device: str) -> dict[str, float]:
    """Do what a process does once, and return the seconds of each: imports, and the first use of the device."""
    begun = time.perf_counter()
    import torch

    torch_there = time.perf_counter()
    import diffusers.models  # noqa: F401 - what loading a denoiser imports

    diffusers_there = time.perf_counter()
    torch.nn.functional.conv2d(
        torch.ones(1, 8, 8, 8, device=device), torch.ones(8, 8, 3, 3, device=device)
    ).sum().item()
    return {
        "torch": round(torch_there - begun, 2),
        "diffusers": round(diffusers_there - torch_there, 2),
        "device": round(time.perf_counter() - diffusers_there, 2),
    }


def register(folder: str, place: Place) -> ModelRow:
    """Copy a model into the store and inspect it, as `quantmill models add` does."""
    (place.folder / "store").mkdir(parents=True, exist_ok=True)
    record = import_model(open_store(str(place.folder / "store")), resolve_source(folder), None)
    # Looking at a model is no part of a job, and happens on the CPU everywhere.
    seen = execute_call(replace(place.call("inspect", {}, {"model": [record.digest]}), device="cpu"))
    inspection = seen.metrics["inspection"]
    return ModelRow("model", record.digest, record.class_name, folder, record.bytes, record.parameters, inspection)


def timed(call: TaskCall) -> tuple[TaskOutput, float, float]:
    """Run a task; return its output and the seconds of the clock and of the CPUs."""
    cpu, wall = time.process_time(), time.perf_counter()
    output = execute_call(call)
    return output, time.perf_counter() - wall, time.process_time() - cpu


def call_of(node: TaskNode, place: Place, done: Mapping[str, TaskOutput]) -> TaskCall:
    """Return the call of a planned task whose sources have run."""
    inputs = {
        name: [done[item.task].outputs[item.output] if isinstance(item, TaskRef) else item for item in items]
        for name, items in node.inputs.items()
    }
    return place.call(node.kind, node.params, inputs)


def run(
    recipe: str, overrides: Sequence[str], model: str, place: Place, report: Report, note: Callable[[], None]
) -> None:
    """Run a job's tasks, counting them in `report`."""
    loaded = load_recipe(recipe, overrides)
    nodes, _ = plan(register(model, place), loaded.recipe)
    done: dict[str, TaskOutput] = {}
    firsts: dict[str, tuple[TaskCall, TaskOutput]] = {}
    for node in nodes:
        call = call_of(node, place, done)
        done[node.id], seconds, cpu = timed(call)
        firsts.setdefault(node.kind, (call, done[node.id]))
        report.kinds.setdefault(node.kind, Spent()).add(seconds, cpu)
        report.seconds += seconds
        found = done[node.id].metrics.get("metrics", {})
        report.metrics |= {name: found[name] for name in FIGURES if name in found}
        note()
    report.finished = True
    for kind in PROFILED:
        if kind in firsts:
            report.again[kind] = profiled(*firsts[kind])
            note()


def profiled(call: TaskCall, before: TaskOutput) -> dict[str, Any]:
    """Run a task again under the profiler; say which functions took longest, and whether its bytes are the same."""
    profile = cProfile.Profile()
    begun = time.perf_counter()
    output = profile.runcall(execute_call, call)
    seconds = time.perf_counter() - begun
    table: dict[tuple[str, int, str], Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    own = sorted(((entry[2], entry[0], where) for where, entry in table.items()), reverse=True)[:FUNCTIONS]
    return {
        "seconds": round(seconds, 3),
        "same_bytes": output.outputs == before.outputs,
        "functions": [
            {"seconds": round(took, 3), "calls": calls, "where": f"{Path(file).name}:{line} {name}"}
            for took, calls, (file, line, name) in own
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module's docstring."""
    command = parser(__doc__)
    command.add_argument("--recipe", default="fast-w4a8")
    command.add_argument("--model", default="examples/models/emoji32")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `quantmill run` takes it")
    command.add_argument("--device", default="cuda")
    command.add_argument("--threads", type=int, default=8)
    command.add_argument("--out", type=Path)
    options = command.parse_args(arguments)
    report = Report(options.recipe, options.device, options.threads)

    def note() -> None:
        if options.out:
            keep(asdict(report), options.out)

    report.starting = start(options.device)
    with tempfile.TemporaryDirectory(prefix="quantmill-device-") as folder:
        run(
            options.recipe,
            options.set,
            options.model,
            Place(options.device, options.threads, Path(folder)),
            report,
            note,
        )
    give(asdict(report), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
