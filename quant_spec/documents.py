"""JSON that comes from outside, read with limits: what is nested too deeply, too long or too large is refused at once.

Python's own reader fails on 1,000 levels with an error of its own, and what passes it may still exhaust whatever walks
over it later. Python also takes NaN for JSON, the number of nothing; infinite ones stand in diffusers' configs.
Every JSON file, header or blob that somebody else may have written is read here.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from quant_spec.errors import InvalidInputError

#: Levels of lists and mappings.
DEEPEST = 64
#: Bytes of a document; a header of safetensors with a hundred thousand tensors has half of it.
LONGEST_BYTES = 32 << 20
#: Values in a document, counted by its commas, colons and brackets: they take about 100 MB at most.
MOST_VALUES = 1_000_000

_SEPARATORS = (b",", b":", b"[", b"{")


def read_json(
    data: bytes | str,
    what: str,
    *,
    error: type[Exception] = InvalidInputError,
    longest: int = LONGEST_BYTES,
    most_values: int = MOST_VALUES,
) -> Any:
    """Return the value of a JSON text.

    Parameters
    ----------
    data
        UTF-8, or text.
    what
        Named at the beginning of a refusal.
    error
        Raised by a refusal, with one line.
    longest, most_values
        Limits for what is known to be larger than other documents.

    Raises
    ------
    InvalidInputError
        Or `error`: if it is not JSON, not UTF-8, holds NaN, or is beyond the limits of this module.
    """

    def constant(name: str) -> float:
        if name == "NaN":
            raise ValueError("NaN is no number")
        return float(name)

    try:
        raw = data.encode() if isinstance(data, str) else data
        if len(raw) > longest:
            raise error(f"{what}: got {len(raw)} bytes of JSON, wanted at most {longest}")
        values = sum(raw.count(sign) for sign in _SEPARATORS)
        if values > most_values:
            raise error(f"{what}: got JSON of {values} values, wanted at most {most_values}")
        value = json.loads(raw, parse_constant=constant)
    except RecursionError:
        raise error(f"{what}: got JSON of very many levels, wanted at most {DEEPEST}") from None
    except ValueError as problem:
        if isinstance(problem, error):
            raise
        reason = " ".join(str(problem).split())[:200]
        raise error(f"{what}: got text that is not JSON ({reason}), wanted JSON") from problem
    if not fits_depth(value):
        raise error(f"{what}: got JSON of more than {DEEPEST} levels, wanted at most {DEEPEST}")
    return value


def read_json_file(path: Path, *, error: type[Exception] = InvalidInputError, what: str | None = None) -> Any:
    """Return the value of a JSON file, as `read_json`; also refused: what is no plain file, which might never end.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    return read_json(read_plain_file(path, LONGEST_BYTES, error=error, what=what), what or str(path), error=error)


def read_plain_file(
    path: Path, most_bytes: int, *, error: type[Exception] = InvalidInputError, what: str | None = None
) -> bytes:
    """Return the bytes of a plain file; `error` if it is none, is larger, or cannot be read.

    A pipe, socket or device is never read: it may wait, or go on, for ever.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    shown = what or str(path)
    try:
        # Not to wait for the other end of a pipe that takes a file's place.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise error(f"{shown}: got {reason}, wanted a readable file") from problem
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise error(f"{shown}: got what is no plain file, wanted one")
    with open(handle, "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise error(f"{shown}: got {max(status.st_size, len(data))} bytes, wanted at most {most_bytes}")
    return data


def fits_depth(value: Any) -> bool:
    """Say whether a value has at most `DEEPEST` levels of lists and mappings."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(DEEPEST):
        if not level:
            return True
        level = [
            item
            for holder in level
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, list | dict)
        ]
    return not level
