"""Running jobs as a user does, through the command line; and what benchmarks take and give on theirs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Job:
    """What `quantmill run --json` says of a job that succeeded."""

    job: str
    recipe: str
    release: str | None
    digest: str
    tasks: Mapping[str, int]
    seconds: float
    metrics: Mapping[str, Any]


def run_recipe(recipe: str, model: str, home: Path, overrides: Sequence[str] = ()) -> Job:
    """Run one job to its end; its records stay in `home`, so that the next finds what it shares with it.

    Parameters
    ----------
    overrides
        As `--set` takes them: "weights.bits=4".

    Raises
    ------
    CalledProcessError
        If it did not succeed.
    """
    base = [sys.executable, "-m", "orchestrator.cli", "--home", str(home)]
    sets = [argument for override in overrides for argument in ("--set", override)]
    done = subprocess.run(
        [*base, "run", recipe, "--model", model, *sets, "--json"], stdout=subprocess.PIPE, check=True, text=True
    )
    view = json.loads(done.stdout)
    return Job(**{name: view[name] for name in Job.__dataclass_fields__})


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring as it is."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def named(pairs: Iterable[str]) -> dict[str, str]:
    """Return arguments of the form NAME=VALUE as a mapping; NAME may hold an equals sign."""
    return {name: value for name, _, value in (pair.rpartition("=") for pair in pairs)}


def give(document: Mapping[str, Any], out: Path | None = None) -> None:
    """Print a benchmark's result as one JSON document, and write it to a file."""
    if out is not None:
        keep(document, out)
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def keep(document: Mapping[str, Any], out: Path) -> None:
    """Write what a benchmark has so far; a process that is killed meanwhile leaves the file as it was."""
    half = out.with_name(f"{out.name}.part")
    half.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    half.replace(out)
