"""What can be done with releases: pull, verify, compare, and throw away what nothing refers to."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.db.jobs import list_jobs
from orchestrator.db.registry import live_digests
from orchestrator.db.releases import find_release
from orchestrator.db.rows import ReleaseRow
from orchestrator.service import Service
from quant_spec.errors import InvalidInputError
from workers.errors import ManifestError
from workers.storage.manifest import pull_tree, read_manifest, verify_tree
from workers.storage.store import Store

#: Blobs younger than this are never collected: a task in flight may be about to record them.
GRACE_SECONDS = 24 * 3600.0
# Of a recipe, about the result.
_SAYS_NOTHING = ("name", "description")
#: A blob that begins so may be a manifest (its JSON is canonical), and none is larger than the limit.
_MANIFEST_START = b'{"files":'
_MANIFEST_BYTES = 16 << 20


def get_release(service: Service, ref: str) -> ReleaseRow:
    """Return the release that a reference means: name@3, name@alias, name, or a digest's beginning."""
    with service.database.session(read_only=True) as session:
        return find_release(session, ref)


def pull_release(service: Service, ref: str, folder: Path) -> ReleaseRow:
    """Write a release into a new folder, every file verified; nothing is left behind if that fails.

    Raises
    ------
    InvalidInputError
        If the folder is not empty, or its parent is missing.
    DigestMismatchError, NotFoundError
        If the store's bytes are not those of the release.
    """
    target = check_target(folder)
    release = get_release(service, ref)
    pull_tree(service.store, release.digest, target)
    return release


def check_target(folder: Path) -> Path:
    """Return a folder that something is to be written into, absolute, if it is new or empty and its parent is there.

    Raises
    ------
    InvalidInputError
        If it is not.
    """
    folder = folder.absolute()
    if not folder.parent.is_dir():
        raise InvalidInputError(f"folder: got {folder}, but there is no {folder.parent}; wanted a place to write")
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise InvalidInputError(f"folder: got {folder}, which is there already, wanted a new or empty folder")
    return folder


def verify_release(service: Service, ref: str) -> tuple[ReleaseRow, list[str]]:
    """Read every byte of a release in the store; return the release and what is wrong, one line each."""
    release = get_release(service, ref)
    return release, verify_tree(service.store, release.digest)


def compare_releases(service: Service, ref_a: str, ref_b: str) -> dict[str, Any]:
    """Return two releases' numbers, recipes and bits of each layer, where they differ.

    Returns
    -------
    dict
        `a`, `b`: "name@N"; `metrics`: name to {a, b}; `recipe`: dotted key to {a, b}, only what differs; `layers`: list
        of {layer, a, b} with the bits as {weights, activations}, only what differs.
    """
    sides = {"a": get_release(service, ref_a), "b": get_release(service, ref_b)}
    recipes = {side: _flat(read_release_json(service.store, row.digest, "recipe.json")) for side, row in sides.items()}
    bits = {
        side: layer_bits(read_release_json(service.store, row.digest, "config.json")) for side, row in sides.items()
    }
    numbers = {side: _numbers(row.metrics) for side, row in sides.items()}
    return {
        "a": sides["a"].ref,
        "b": sides["b"].ref,
        "same_bytes": sides["a"].digest == sides["b"].digest,
        "metrics": {name: _pair(numbers, name) for name in _keys(numbers)},
        "recipe": {
            name: _pair(recipes, name)
            for name in _keys(recipes)
            if name not in _SAYS_NOTHING and _differs(recipes, name)
        },
        "layers": [{"layer": name, **_pair(bits, name)} for name in _keys(bits) if _differs(bits, name)],
    }


def layer_bits(config: dict[str, Any]) -> dict[str, dict[str, int | None]]:
    """Return the bits of weights and activations of every quantized layer, from a release's config.json."""
    known = config["quantization_config"]
    layers, formats = known["layers"], known.get("formats")
    if formats is not None:
        layers = {name: formats[place] for name, place in layers.items()}
    return {
        name: {
            "weights": (spec.get("weight") or {}).get("bits"),
            "activations": (spec.get("activation") or {}).get("bits"),
        }
        for name, spec in layers.items()
    }


@dataclass(frozen=True, slots=True)
class Garbage:
    """What a collection removed, or would: blobs that nothing refers to, their bytes, and unfinished uploads."""

    blobs: int
    bytes: int
    leftovers: int
    kept: int


def collect_garbage(service: Service, *, grace_seconds: float = GRACE_SECONDS, dry_run: bool = False) -> Garbage:
    """Remove blobs that no model, recorded result, release or job refers to.

    Parameters
    ----------
    service
        Its whole store is listed.
    grace_seconds
        Blobs put since then stay, whoever refers to them.
    dry_run
        Only count.

    Notes
    -----
    The store is listed before the database is read, so that a blob recorded in between is seen as referred to.
    """
    limit = time.time() - grace_seconds
    listed = list(service.store.list())
    old = [(digest, size) for digest, size, modified in listed if modified < limit]
    live = _reachable(service)
    dead = [(digest, size) for digest, size in old if digest not in live]
    leftovers = 0
    if not dry_run:
        for digest, _ in dead:
            service.store.delete(digest)
        leftovers = service.store.sweep(grace_seconds)
    return Garbage(len(dead), sum(size for _, size in dead), leftovers, len(listed) - len(dead))


def _reachable(service: Service) -> set[str]:
    """Return every digest that the database refers to, and those inside the manifests among them."""
    with service.database.session(read_only=True) as session:
        live = set(live_digests(session))
        for job in list_jobs(session, limit=2**31 - 1):
            weights = (job.recipe.get("evaluation") or {}).get("extractor_weights")
            live |= {weights} if weights else set()
    for digest in list(live):
        live.update(_inside(service.store, digest))
    return live


def _inside(store: Store, digest: str) -> Iterable[str]:
    """Return the digests that a blob lists, if it is a manifest."""
    if not store.exists(digest) or store.size(digest) > _MANIFEST_BYTES:
        return ()
    if not store.get_bytes(digest).startswith(_MANIFEST_START):
        return ()
    try:
        return [entry["sha256"] for entry in read_manifest(store, digest)["files"].values()]
    except ManifestError:
        return ()


def read_release_json(store: Store, digest: str, path: str) -> dict[str, Any]:
    """Return one JSON file of a release; ManifestError if the release has no such file."""
    entry = read_manifest(store, digest)["files"].get(path)
    if entry is None:
        raise ManifestError(f"release {digest[:12]}: got no {path}, wanted one")
    document: dict[str, Any] = json.loads(store.get_bytes(entry["sha256"]))
    return document


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics that are single numbers."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _keys(sides: dict[str, dict[str, Any]]) -> list[str]:
    return list(sides["a"] | sides["b"])


def _pair(sides: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    return {"a": sides["a"].get(key), "b": sides["b"].get(key)}


def _differs(sides: dict[str, dict[str, Any]], key: str) -> bool:
    pair = _pair(sides, key)
    return bool(pair["a"] != pair["b"])
