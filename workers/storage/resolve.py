"""From a release's name, or an artifact's address in S3, to a verified local folder: for `quant_core.load_quantized`.

Names live in the database, which workers do not know: the command line is asked, in a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from quant_spec.errors import InvalidInputError
from workers.errors import NotFoundError, WorkerError
from workers.storage.blobs import digest_of_file
from workers.storage.manifest import MANIFEST_NAME, check_folder, pull_tree
from workers.storage.private import make_private
from workers.storage.store import open_store

_PULL = (sys.executable, "-P", "-m", "orchestrator.cli", "artifacts", "pull")
_NOT_FOUND = 102
#: The address of an artifact: that of its manifest's blob in a store.
_ADDRESS = re.compile(r"(?P<store>s3://.+)/sha256/[0-9a-f]{2}/(?P<digest>[0-9a-f]{64})")


class ResolveError(WorkerError, InvalidInputError):
    """A reference that names no artifact that we can get."""

    exit_code = 2


def pull(reference: str) -> Path:
    """Return a local folder with the artifact that a reference names.

    Parameters
    ----------
    reference : str
        `name@version`, `name@alias`, `name`, a digest, or `s3://bucket/prefix/sha256/ab/<digest>`.

    Returns
    -------
    Path
        `releases/<digest>` in Quantmill's home (`QUANTMILL_HOME`, by default `~/.quantmill`); kept for the next time.
        What was kept is checked against its digest, and pulled again if it is not what it was.

    Raises
    ------
    NotFoundError
        If there is no such release or artifact.
    ResolveError
        If the reference is an S3 address of something else, or the command line failed.
    """
    folder = Path(os.environ.get("QUANTMILL_HOME") or "~/.quantmill").expanduser().absolute() / "releases"
    if not reference.startswith("s3://"):
        return _pull_into(folder, lambda target: _pull_by_name(reference, target))
    match = _ADDRESS.fullmatch(reference)
    if match is None:
        raise ResolveError(f"artifact {reference!r}: wanted s3://bucket/prefix/sha256/ab/<64 hexadecimal digits>")
    kept = folder / match["digest"]
    if kept.is_dir() and not check_folder(kept, match["digest"], alone=False):
        return kept
    return _pull_into(folder, lambda target: pull_tree(open_store(match["store"]), match["digest"], target))


def _pull_into(folder: Path, fill: Callable[[Path], object]) -> Path:
    """Let `fill` write a new folder, and keep it under its manifest's digest; on failure nothing is left."""
    make_private(folder)
    work = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        fresh = work / "tree"
        fill(fresh)
        kept = folder / digest_of_file(fresh / MANIFEST_NAME)
        if kept.is_dir() and check_folder(kept, kept.name, alone=False):
            with suppress(OSError):  # another process was first
                kept.rename(work / "damaged")
        if not kept.is_dir():
            try:
                fresh.rename(kept)
            except OSError:  # another process was first
                if not kept.is_dir():
                    raise
        return kept
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pull_by_name(name: str, target: Path) -> None:
    """Run `quantmill artifacts pull`."""
    run = subprocess.run([*_PULL, name, str(target)], capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return
    reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    message = f"artifact {name!r}: {reason.removeprefix('error: ')}"
    raise NotFoundError(message, name) if run.returncode == _NOT_FOUND else ResolveError(message)
