"""What a search over many models shares: task-seconds spent, beside those of each of its jobs run on its own.

    python -m benchmarks.search_models --work FOLDER --out benchmarks/results/search-models.json

Twenty models: ten variations of each of two shipped architectures, every weight tensor with Gaussian noise of 1 % of
its standard deviation added, as fine-tunes of one parent are. Five budgets each. `saved` is the share of the
task-seconds that independent runs of the same jobs (each in an empty home) would have taken more; a task's seconds are
counted once, where it was computed. With `--cold N`, the first N models of each architecture are searched again
without the parent's front, in a home of their own: what a warm start costs in quality, and saves.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.cli import keep, parser

PARENTS = ("digits", "emoji32")
NOISE = 0.01
#: Few steps and samples: what is shared does not depend on them.
SETTINGS = {
    "sampler.num_inference_steps": 10,
    "calibration.seeds": 8,
    "evaluation.seeds": 32,
    "evaluation.shard_seeds": 32,
    "evaluation.batch_size": 32,
}
SPEC: dict[str, Any] = {
    "recipe": "fast-w4a8",
    "set": SETTINGS,
    "space": {"weight_bits": [2, 3, 4, 5, 6, 8]},
    "budgets": [{"weight_bits_mean": bits} for bits in (3, 3.5, 4, 5, 6)],
    "screening": {"seeds": 8, "batch_size": 8},
    "effort": {"rounds": 1, "candidates": 5},
    "points": 5,
    "publish": 5,
    "baselines": False,
}


def write_models(folder: Path, each: int) -> list[str]:
    """Write variations of each parent; return their folders' names, the parents' in turn."""
    names: list[str] = []
    for place in range(each):
        for parent in PARENTS:
            name = f"{parent}-{place:02d}"
            names.append(name)
            if (folder / name).exists():
                continue
            shutil.copytree(Path("examples/models") / parent, folder / f"{name}.part")
            generator = torch.Generator().manual_seed(place)
            for path in (folder / f"{name}.part").rglob("*.safetensors"):
                _perturb(path, generator)
            (folder / f"{name}.part").replace(folder / name)
    return names


def _perturb(path: Path, generator: torch.Generator) -> None:
    """Add noise to every floating tensor of more than one value."""
    tensors = load_file(path)
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.is_floating_point() and tensor.numel() > 1:
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor + (NOISE * tensor.std() * noise).to(tensor)
    save_file(tensors, path, {"format": "pt"})


def search(work: Path, home: str, models: Sequence[str], **changes: Any) -> dict[str, Any]:
    """Run a search over some of the models; return what it took, and each model's front."""
    spec = work / f"{home}.yaml"
    spec.write_text(yaml.safe_dump(SPEC | {"models": [f"models/{name}" for name in models]} | changes))
    started = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "orchestrator.cli",
        "--home",
        str(work / home),
        "search",
        "run",
        str(spec),
        "--json",
    ]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    spent, saved = found["task_seconds"], found["saved_seconds"]
    fronts = {
        name: [
            {key: point[key] for key in ("bytes", "weight_bits_mean", "psnr_db", "n", "origin") if key in point}
            for point in points
            if point["on_front"]
        ]
        for name, points in found["models"].items()
    }
    return {
        "models": len(models),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "tasks": found["tasks"],
        "task_seconds": spent,
        "independent_task_seconds": round(spent + saved, 3),
        "saved": round(saved / (spent + saved), 4),
        "fronts": fronts,
    }


def main(options: Namespace) -> None:
    """Measure, and write one JSON document after each search."""
    work: Path = options.work
    (work / "models").mkdir(parents=True, exist_ok=True)
    names = write_models(work / "models", options.each)
    document: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "spec": SPEC,
        "noise": NOISE,
    }
    document["warm"] = search(work, "warm", names, warm_start=True)
    keep(document, options.out)
    if options.cold:
        document["cold"] = search(work, "cold", names[: len(PARENTS) * options.cold], warm_start=False)
        keep(document, options.out)


if __name__ == "__main__":
    given = parser(__doc__)
    given.add_argument("--work", type=Path, required=True)
    given.add_argument("--each", type=int, default=10, help="models of each architecture")
    given.add_argument("--cold", type=int, default=0, help="models of each architecture searched without a parent too")
    given.add_argument("--out", type=Path, required=True)
    main(given.parse_args())
