"""Is this machine fit to run Quantmill? One check a function; none of them changes anything that stays."""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.actions.cluster import left_out
from orchestrator.actions.gpu_check import check_gpu
from orchestrator.actions.probe import run_python
from orchestrator.db.orchestrators import OrchestratorState, clusters, list_orchestrators
from orchestrator.db.session import current, open_database
from orchestrator.service import private_paths
from orchestrator.settings import Settings
from orchestrator.store_owner import StoreOwner, store_owner
from orchestrator.text import human_seconds
from quant_spec.errors import QuantServiceError
from quant_spec.numbers import human_bytes
from workers.errors import StoreError
from workers.execution.ray_security import token_file
from workers.storage.private import is_private
from workers.storage.store import Store, open_store
from workers.urls import hide_passwords, known_secrets

_PYTHON = (3, 11)
#: Before this version anyone's browser could delete jobs through Ray's dashboard (CVE-2026-27482).
_RAY = (2, 54)
_FREE_BYTES = 2 * 10**9
_TORCH_SECONDS = 120
_TORCH = """
import torch, diffusers
try:
    from kernels.backend import has_int8_cpu
    exact = has_int8_cpu()
except ImportError:  # another package of that name: the next check says so
    exact = False
print(torch.__version__, diffusers.__version__, torch.cuda.device_count(), int(exact))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, whether it is as it must be, and what was found."""

    name: str
    ok: bool
    detail: str


def examine(settings: Settings) -> list[Check]:
    """Run every check.

    Parameters
    ----------
    settings
        Where the database and the store are.

    Returns
    -------
    list of Check
        In a fixed order; a check that fails says what was found and what is wanted.
    """
    checks: dict[str, Callable[[], tuple[bool, str]]] = {
        "python": _python,
        "torch": _torch,
        "kernels": _kernels,
        "gpu": check_gpu,
        "ray": lambda: _ray(settings.ray_address, os.environ),
        "database": lambda: _database(settings),
        "orchestrators": lambda: _orchestrators(settings),
        "store": lambda: _store(settings),
        "home": lambda: _home(settings),
        "disk": lambda: _disk(settings.home),
        "nodes": lambda: _nodes(settings),
    }
    return [_run(name, check) for name, check in checks.items()]


def _run(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        ok, detail = check()
    except (QuantServiceError, OSError, ValueError, metadata.PackageNotFoundError) as error:
        ok, detail = False, hide_passwords(" ".join(str(error).split()), known_secrets(os.environ))
    return Check(name, ok, detail)


def _python() -> tuple[bool, str]:
    return sys.version_info >= _PYTHON, f"{sys.version.split()[0]}, wanted at least {_PYTHON[0]}.{_PYTHON[1]}"


def _torch() -> tuple[bool, str]:
    """Import torch and diffusers where the tasks will: in another process."""
    try:
        run = run_python(_TORCH, _TORCH_SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"no answer from importing torch and diffusers for {_TORCH_SECONDS} s"
    if run.returncode:
        return False, (run.stderr.strip().splitlines() or ["cannot be imported"])[-1]
    torch_version, diffusers_version, devices, exact = run.stdout.split()[-4:]
    none = "a CPU without exact int8 products: most weights become float32 on it"
    cpu = "a CPU with int8 products" if int(exact) else none
    return True, f"torch {torch_version}, diffusers {diffusers_version}, {devices} CUDA devices, {cpu}"


def _kernels() -> tuple[bool, str]:
    """Say if ours are compiled; find Hugging Face's package of that import name, which diffusers probes for."""
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        built = find_spec("kernels._native") is not None
        how = "compiled for this CPU" if built else "not compiled (no C compiler found): half as fast on a CPU"
        return True, f"{how}; no other package is called kernels"
    return False, f"Hugging Face's package kernels {version} is installed, wanted none: pip uninstall kernels"


def _ray(address: str | None, environ: Mapping[str, str]) -> tuple[bool, str]:
    version = metadata.version("ray")
    if tuple(int(part) for part in version.split(".")[:2]) < _RAY:
        return False, f"ray {version}, wanted at least {_RAY[0]}.{_RAY[1]}"
    if address is None or address == "local" or _is_loopback(address):
        return True, f"ray {version}, local, reachable from this machine only, with a token of its own"
    if environ.get("RAY_AUTH_MODE", "").lower() == "token":
        token = token_file(environ)
        if token is not None and not is_private(token):
            return False, f"others may read Ray's token in {token}, wanted for you alone: chmod 600 {token}"
        return True, f"ray {version} at {address}, RAY_AUTH_MODE=token"
    return False, f"ray {version} at {address} without RAY_AUTH_MODE=token: whoever reaches it runs commands there"


def _is_loopback(address: str) -> bool:
    host = urlsplit(address if "://" in address else f"ray://{address}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _database(settings: Settings) -> tuple[bool, str]:
    state = current(settings.database_url)
    if state.revision is None and settings.embedded_database:
        return True, f"{settings.database_path} will be made on first use"
    if state.revision != state.head:
        return False, f"schema {state.revision or 'none'}, wanted {state.head}: quantmill db upgrade"
    database = open_database(settings.database_url)
    try:
        # Takes the write lock on SQLite, which a file system without locks or rights refuses.
        with database.session():
            return True, f"{database.shown_url}, schema {state.revision}"
    finally:
        database.close()


def _orchestrators(settings: Settings) -> tuple[bool, str]:
    """Say who works on the database, and who waits for what."""
    state = current(settings.database_url)
    if state.revision != state.head:
        return True, "unknown, as the database has another schema"
    database = open_database(settings.database_url)
    try:
        with database.session(read_only=True) as session:
            rows = list_orchestrators(session)
    finally:
        database.close()
    said = []
    for row in rows:
        silent = f" (last heard of {human_seconds(row.silent_seconds)} ago)"
        reason = f" for the {row.note.reason}" if row.note.state is OrchestratorState.WAITING else ""
        gone = row.note.state is OrchestratorState.GONE
        said.append(f"{row.note.id} {row.note.state}{silent if gone else reason}")
    waiting = any(row.note.state is OrchestratorState.WAITING for row in rows)
    return not waiting, "; ".join(said) or "none at work: quantmill serve starts one"


def _store(settings: Settings) -> tuple[bool, str]:
    """Write, read and remove a blob that nobody else can have."""
    if settings.embedded_store and not Path(settings.store_url).is_dir():
        return True, f"{settings.store} will be made on first use"
    # One that hangs is to be told in seconds, not when a task would give up.
    store = open_store(settings.store_url, quick=True)
    data = b"quantmill doctor " + secrets.token_bytes(32)
    digest = store.put_bytes(data)
    try:
        if store.get_bytes(digest) != data:
            raise StoreError(f"{store.url}: got other bytes back than were written")
    finally:
        store.delete(digest)
    return True, f"{store.url}: writes, reads and deletes{_owner(settings, store)}"


def _owner(settings: Settings, store: Store) -> str:
    """Say whose the store is, if there is a database to compare it with."""
    state = current(settings.database_url)
    if state.revision != state.head:
        return ""
    database = open_database(settings.database_url)
    try:
        owner = store_owner(database, store)
    finally:
        database.close()
    kept = "" if owner is StoreOwner.OURS else ", so artifacts gc removes nothing (quantmill init --adopt)"
    return f"; it belongs to {owner}{kept}"


def _home(settings: Settings) -> tuple[bool, str]:
    """Find what other users of this machine could read or change."""
    if not settings.home.is_dir():
        return True, f"{settings.home} will be made on first use, for you alone"
    wide = [str(path) for path in private_paths(settings) if not is_private(path)]
    if wide:
        return (
            False,
            f"others may read or enter {', '.join(wide)}, wanted for you alone: quantmill init, or chmod go-rwx",
        )
    return True, f"{settings.home}, for you alone"


def _nodes(settings: Settings) -> tuple[bool, str]:
    """Say what the orchestrators that work on this database see of their clusters, and which nodes they leave out."""
    if current(settings.database_url).revision is None:
        return True, "no orchestrator is at work"
    database = open_database(settings.database_url)
    try:
        with database.session(read_only=True) as session:
            found = clusters(session)
    finally:
        database.close()
    if not found:
        return True, "no orchestrator is at work"
    if lines := left_out(found.values()):
        return False, "; ".join(lines)
    nodes = {node["node"]: node for cluster in found.values() for node in cluster.get("nodes", ())}
    if not nodes:
        return True, f"{len(found)} orchestrators at work, none of which has had a task: each looks at its cluster then"
    gpus = sum(node["gpus"] for node in nodes.values())
    return True, f"{len(found)} orchestrators at work see {len(nodes)} nodes with {gpus} GPUs, and use all of them"


def _disk(home: Path) -> tuple[bool, str]:
    folder = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    return free >= _FREE_BYTES, f"{human_bytes(free)} free at {folder}, wanted at least {human_bytes(_FREE_BYTES)}"
