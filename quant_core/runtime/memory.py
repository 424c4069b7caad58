"""What the process's allocator holds back."""

from __future__ import annotations

import ctypes
import sys


def return_free_memory() -> None:
    """Give freed memory back to the system, where the allocator can (glibc's)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
