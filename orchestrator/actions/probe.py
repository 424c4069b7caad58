"""Ask a Python process of its own what the orchestrator, which never imports torch, cannot find out."""

from __future__ import annotations

import subprocess
import sys


def run_python(code: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run code in a new Python process, which imports nothing from the current folder; keep what it prints.

    Raises
    ------
    subprocess.TimeoutExpired
        If it has not ended after so many seconds; it is killed.
    """
    # Safe: our own code, in the interpreter that is running.
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
