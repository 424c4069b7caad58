"""The name of a task's result: the digest of everything that decides its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def task_digest(kind: str, version: int, params: Mapping[str, Any], inputs: Mapping[str, Sequence[Any]]) -> str:
    """Return the digest of a task: its id where inputs stand as references, its key where all are digests."""
    text = canonical_json({"kind": kind, "version": version, "params": dict(params), "inputs": dict(inputs)})
    return hashlib.sha256(text.encode()).hexdigest()


def task_key(kind: str, version: int, params: Mapping[str, Any], inputs: Mapping[str, Sequence[str]]) -> str:
    """Return the name of a task's result.

    Parameters
    ----------
    kind, version
        What is computed, and which version of the code computes it.
    params
        JSON.
    inputs
        Name to the digests of the bytes read, in order.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    return task_digest(kind, version, params, {name: list(digests) for name, digests in inputs.items()})
