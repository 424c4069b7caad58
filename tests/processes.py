"""Waiting for processes to end."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil


def gone(processes: Sequence[psutil.Process], seconds: float = 90.0) -> bool:
    """Wait until the processes have ended; one that only its parent could clear away has."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
            return True
        time.sleep(0.05)
    return False
