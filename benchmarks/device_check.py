"""Everything that only a GPU can show, in one command that ends in time and keeps what it has.

    python -m benchmarks.device_check [--minutes 8] [--stages tests tune step kernels jobs] [--candidates TEXT]
        [--tuning ARGUMENTS] [--out FILE] [--device cuda]

Stages, each a process of its own with a share of the time, which is killed when that is over; FILE is written anew
after each, and holds what a killed one had written:

tests     tests of tests/kernels, on the device
tune      benchmarks.tune: tiles of the kernels, timed; with --install, later stages use the table
step      benchmarks.gpu_step: a step of each of MODELS at batch 4, in its formats beside bfloat16, under a CUDA graph,
          bfloat16 also with its blocks compiled; bfloat16 compiles beside the stages before, the packed models are
          built behind them, and all are timed in turn
kernels   benchmarks.kernels: each layer's kernels beside bfloat16, and the kernels that quantize beside a copy
jobs      benchmarks.device_jobs for RECIPES on the device, and on this machine's CPUs, which run beside the other
          stages: seconds by kind of task, PSNR of both, and what the tasks spend their time in

`summary` in FILE has the figures to look at first; it is printed as well.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cli import keep, parser
from benchmarks.kernels import MODULATED, NORM, SILU
from kernels.gates import Gate

RECIPES = ("fast-w4a8", "tfmq-w8a8", "mpqdm-w4a4")
_INTEGERS = ("W8A8", "W4A8 g64 of integers")
#: Models whose steps are timed, with formats: FP8 has no convolutions.
MODELS = {
    "sdxl": _INTEGERS,
    "dit-xl": (*_INTEGERS, "FP8"),
    "sd3": (*_INTEGERS, "FP8"),
    "flux": (*_INTEGERS, "FP8"),
}
#: Shares of the minutes among the stages that run; the jobs' is what is left.
SHARES = {"tests": 0.15, "tune": 0.3, "step": 0.3, "kernels": 0.25, "jobs": 0.1}
STAGES = tuple(SHARES)
LOG_LINES = 80
#: Candidates of benchmarks.kernels that are in the summary.
KERNELS = (
    *("torch._int_mm", "torch._int_mm, uniform codes", "W8A8, uniform codes"),
    *("W8A8", "W8A8 with quantization", "W8A8, zero points", "W8A8, zero points with quantization"),
    *("W4A8 packed", "W4A8, unpacked", "W4A8, unpacked with quantization", "W4A8 g128 packed", "W4A8 g128, unpacked"),
    *("W4A8 g64 of integers packed", "W4A8 g64 of integers packed with quantization", "W4A8 g64 of integers, unpacked"),
    *("W3/4/5A8", "W3/4/5A8, unpacked", "FP8", "FP8 with quantization"),
    *(f"{name} behind {what}" for name in ("W8A8", "FP8") for what in (NORM, MODULATED, *Gate)),
    f"W8A8 behind {SILU}",
)
#: Processes of the tests: compiling is what takes their time.
PROCESSES = 8
#: Files of tests/kernels that run on the device, what is newest first.
TESTED = ("hopper", "rotary", "norms", "gates", "activations", "fp8", "gemm", "sums", "weights", "conv", "operators")


@dataclass(slots=True)
class Running:
    """A stage's process, the file that it writes, and its log."""

    name: str
    process: subprocess.Popen[bytes]
    out: Path
    log: Path
    started: float

    def finish(self, seconds: float) -> dict[str, Any]:
        """Wait that long, kill what is left of it, and return what it wrote."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, seconds))
        return self.end()

    def end(self) -> dict[str, Any]:
        """Kill it if it runs, and return what it wrote."""
        cut = self.process.poll() is None
        took = time.monotonic() - self.started
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with what it started
        code = self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        found = {"seconds": round(took, 1), "cut": cut, "exit_code": code, "log": lines}
        if self.out.is_file():
            found["result"] = json.loads(self.out.read_text(encoding="utf-8"))
        return found


def start(name: str, command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> Running:
    """Start a stage; {out} in its command is the file that it writes."""
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    arguments = [sys.executable, *(text.replace("{out}", str(out)) for text in command)]
    with log.open("wb") as target:
        process = subprocess.Popen(
            arguments, stdout=target, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
        )  # fmt: skip
    return Running(name, process, out, log, time.monotonic())


def job(recipe: str, device: str, threads: int) -> list[str]:
    """Return the command of a job."""
    place = ["--device", device, "--threads", str(threads)]
    return ["-m", "benchmarks.device_jobs", "--recipe", recipe, *place, "--out", "{out}"]


def step(model: str, turn: Path, after: Path) -> list[str]:
    """Return the command of a model's step, whose packed models are built once `after` is there."""
    command = ["-m", "benchmarks.gpu_step", "--models", model, "--batches", "4", "--formats", *MODELS[model]]
    command += ["--repeats", "7", "--compile-blocks", "--kernels", "--after", str(after)]
    return [*command, "--turn", str(turn), "--others", str(len(MODELS) - 1), "--out", "{out}"]


def tests(device: str) -> list[str]:
    """Return the command of the kernels' tests; the root's conftest wants packages that may not be there."""
    mark = "not slow" if device == "cuda" else "not gpu and not slow"
    plain = ["-o", "filterwarnings=default", "-p", "no:cacheprovider", "--confcutdir=tests/kernels"]
    spread_out = ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else []
    files = [f"tests/kernels/test_{name}.py" for name in TESTED]
    return ["-m", "pytest", "-v", "--no-header", "-m", mark, *plain, *spread_out, *files]


def verdicts(log: Path) -> dict[str, Any]:
    """Count the tests that passed, and name those that did not, also of a run that was cut."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = {
        (name, verdict)
        for verdict, name in re.findall(r"(PASSED|FAILED|ERROR|SKIPPED)(?: \[ *\d+%\])? (\S+::\S+)", text)
    }
    found |= {(name, verdict) for name, verdict in re.findall(r"(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)", text)}
    failed = sorted(name for name, verdict in found if verdict in ("FAILED", "ERROR"))
    return {"passed": len({name for name, verdict in found if verdict == "PASSED"}), "failed": failed}


class Check:
    """The stages of one run, and the file that holds what they found."""

    def __init__(
        self, device: str, minutes: float, out: Path, install: bool, candidates: str = "", tuning: Sequence[str] = ()
    ) -> None:
        self.device, self.out, self.install, self.candidates, self.tuning = device, out, install, candidates, tuning
        self.minutes, self.began = minutes, time.monotonic()
        self.found: dict[str, Any] = {"device": device, "versions": versions(), "stages": {}}
        self.folder = Path(tempfile.mkdtemp(prefix="quantmill-check-"))
        self.beside: list[Running] = []

    def left(self) -> float:
        """Return the seconds that are left in all."""
        return 60 * self.minutes - (time.monotonic() - self.began)

    def note(self, name: str, found: dict[str, Any]) -> None:
        """Keep what a stage found."""
        self.found["stages"][name] = found
        self.found["seconds"] = round(time.monotonic() - self.began, 1)
        self.found["summary"] = summary(self.found["stages"])
        keep(self.found, self.out)
        print(f"{name}: {found['seconds']} s, exit code {found['exit_code']}{', cut' * found['cut']}", flush=True)

    def share(self, stage: str, stages: Sequence[str]) -> float:
        """Return the seconds of one of the stages that run."""
        part = SHARES[stage] / sum(SHARES[each] for each in stages)
        return max(5.0, min(60 * self.minutes * part, self.left()))

    def run(self, stages: Sequence[str], recipes: Sequence[str]) -> None:
        """Run the stages, in the order of STAGES."""
        if "jobs" in stages and self.device != "cpu":
            for recipe in recipes:
                # Half of the cores stay with what drives the device.
                threads = max(1, (os.cpu_count() or 2) // (2 * len(recipes)))
                name, hidden = f"{recipe} on cpu", {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
                self.beside.append(start(name, job(recipe, "cpu", threads), self.folder, hidden))
        turn, tuned = self.folder / "turn", self.folder / "tuned"
        steps = [
            start(f"step of {model}", step(model, turn, tuned), self.folder) for model in MODELS if "step" in stages
        ]
        if "tests" in stages:
            running = start("tests", tests(self.device), self.folder)
            found = running.finish(self.share("tests", stages))
            self.note("tests", found | {"result": verdicts(running.log)})
        if "tune" in stages:
            seconds = self.share("tune", stages)
            minutes = ["--minutes", str(round(seconds / 60 - 0.1, 2))]
            command = ["-m", "benchmarks.tune", *minutes, "--out", "{out}", *["--install"] * self.install]
            self.note("tune", start("tune", [*command, *self.tuning], self.folder).finish(seconds))
        tuned.touch()
        until = time.monotonic() + (self.share("step", stages) if steps else 0.0)
        for running in steps:
            self.note(running.name, running.finish(until - time.monotonic()))
        if "kernels" in stages:
            seconds = self.share("kernels", stages)
            minutes = ["--minutes", str(round(seconds / 60 - 0.1, 2))]
            command = ["-m", "benchmarks.kernels", "--batches", "8", "--repeats", "15", *minutes, "--out", "{out}"]
            command += ["--candidates", self.candidates]
            self.note("kernels", start("kernels", command, self.folder).finish(seconds))
        for recipe in recipes if "jobs" in stages else ():
            name = f"{recipe} on {self.device}"
            if self.left() > 0:
                command = job(recipe, self.device, min(4, os.cpu_count() or 1))
                self.note(name, start(name, command, self.folder).finish(self.left()))
        for running in self.beside:
            self.note(running.name, running.finish(self.left()))


def versions() -> dict[str, str]:
    """Return what the figures depend on."""
    from importlib import metadata

    found = {"python": sys.version.split()[0], "cores": str(os.cpu_count())}
    for name in ("torch", "triton", "diffusers"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def summary(stages: dict[str, Any]) -> dict[str, Any]:
    """Return the figures to look at first."""
    found: dict[str, Any] = {}
    if "tests" in stages:
        found["tests"] = stages["tests"]["result"]
    tuned = stages.get("tune", {}).get("result", {})
    for op in sorted({row["op"] for row in tuned.get("measured", ())}):
        rows = [row for row in tuned["measured"] if row["op"] == op]
        before = [row["bfloat16_us"] / row["before_us"] for row in rows]
        after = [row["bfloat16_us"] / min(row["before_us"], *(t["us"] for t in row["tiles"])) for row in rows]
        found[f"{op}, of bfloat16's speed"] = {
            "layers": len(rows), "before": spread(before), "after": spread(after),
        }  # fmt: skip
    for model, formats in MODELS.items():
        batches = stages.get(f"step of {model}", {}).get("result", {}).get("models", {}).get(model, {})
        for batch, timed in batches.items():
            for name in formats:
                found[f"step of {model}, batch {batch}, {name}"] = timed[name]["ms"] | {
                    "speedup": timed[name]["speedup"]
                }
    layers = stages.get("kernels", {}).get("result", {}).get("batches", {}).get("8", {})
    for name in KERNELS:
        speeds = [timed[name]["speedup"] for timed in layers.values() if "speedup" in timed.get(name, {})]
        if speeds:
            found[f"kernels: {name}"] = spread(speeds)
    quantizing = stages.get("kernels", {}).get("result", {}).get("quantize", {})
    found["quantize, of a copy's bandwidth"] = {
        name: row.get("of_copy", row.get("error")) for name, row in quantizing.items()
    }
    for name, stage in stages.items():
        if " on " in name and "result" in stage:
            result = stage["result"]
            kinds = {kind: round(spent["seconds"], 1) for kind, spent in result["kinds"].items()}
            found[name] = {
                "finished": result["finished"], "psnr_db": result["metrics"].get("psnr_db"),
                "seconds": round(result["seconds"], 1), "by_kind": kinds,
            }  # fmt: skip
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return least, median and greatest."""
    return {"least": round(min(values), 3), "median": round(median(values), 3), "greatest": round(max(values), 3)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module's docstring."""
    command = parser(__doc__)
    command.add_argument("--minutes", type=float, default=8.0)
    command.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    command.add_argument("--recipes", nargs="+", default=RECIPES)
    command.add_argument("--candidates", default="", help="as benchmarks.kernels takes it")
    command.add_argument("--tuning", default="", help="what benchmarks.tune is given besides, in one argument")
    command.add_argument("--device", default="cuda", help="cpu tries the command out where there is no GPU")
    command.add_argument("--install", action="store_true", help="as benchmarks.tune takes it")
    command.add_argument("--out", type=Path, default=Path("device-check.json"))
    options = command.parse_args(arguments)
    stages = [stage for stage in STAGES if stage in options.stages]
    if options.device == "cpu":
        stages = [stage for stage in stages if stage in ("tests", "jobs")]
    check = Check(
        options.device, options.minutes, options.out, options.install, options.candidates, shlex.split(options.tuning)
    )
    check.run(stages, options.recipes)
    print(json.dumps(check.found["summary"], indent=1))
    cut = any(stage["exit_code"] for stage in check.found["stages"].values())
    return 1 if cut else 0


if __name__ == "__main__":
    sys.exit(main())
