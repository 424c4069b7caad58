"""Telling beyond doubt whether a process of this machine has ended: by its boot, its space of numbers and its birth."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_BOOT, _SPACE = _PROC / "sys/kernel/random/boot_id", _PROC / "self/ns/pid"
# Of what follows a process' name in its `stat`: its state, and when it began, in ticks since the boot.
_STATE, _BORN, _DEAD = 0, 19, ("Z", "X")


def own_process() -> dict[str, Any]:
    """Return what names this process among all that ever were, as JSON; nothing where the system does not tell."""
    try:
        return {**_place(), "pid": os.getpid(), "born": _stat(os.getpid())[_BORN]}
    except OSError:
        return {}


def has_ended(process: Mapping[str, Any]) -> bool:
    """Say whether a process, as `own_process` named it, has ended; False if that cannot be known from here."""
    try:
        if not process or any(process.get(name) != value for name, value in _place().items()):
            return False
    except OSError:
        return False
    try:
        found = _stat(process["pid"])
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return found[_BORN] != process["born"] or found[_STATE] in _DEAD


def _place() -> dict[str, Any]:
    """Return where numbers of processes mean the same: one boot of a machine, one container."""
    return {"boot": _BOOT.read_text(encoding="ascii").strip(), "space": _SPACE.stat().st_ino}


def _stat(pid: int) -> list[str]:
    """Return what the system says of a process, behind its name, which may hold anything."""
    return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
