"""Look into safetensors files without loading them: is the file whole, and are all of its numbers finite?

The format: 8 bytes (little-endian) with the length of a JSON header, the header (name to dtype, shape and the offsets
of its bytes), then the bytes [https://github.com/huggingface/safetensors]. bfloat16 and the 8-bit floats are judged by
their bits, as numpy does not know them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_spec.documents import LONGEST_BYTES, read_json
from workers.errors import ModelError

# Bytes looked at once.
_CHUNK_BYTES = 8 << 20

# Dtype to bytes per number.
_WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

# Dtype to the bits of its exponent: all of them set means infinite or not a number. F8_E4M3 has no infinity, and is not
# a number only where all bits but the sign are set.
_EXPONENTS = {
    "F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E5M2": 0x7C, "F8_E4M3": 0x7F,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a file: its bytes are `file[start:end]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def read_header(path: Path) -> list[TensorEntry]:
    """Return the tensors of a file, in the order of their bytes.

    Raises
    ------
    ModelError
        If the file is not safetensors, or is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if len(first) < 8 or length > size - 8:
            raise ModelError(f"{path}: got {size} bytes without a whole header, wanted safetensors (truncated?)")
        if length > LONGEST_BYTES:
            raise ModelError(f"{path}: got a header of {length} bytes, wanted at most {LONGEST_BYTES}")
        header = file.read(length)
    fields = read_json(header, f"{path}: header", error=ModelError)
    try:
        entries = [_entry(name, field, 8 + length) for name, field in fields.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: got a header that cannot be read ({error}), wanted safetensors") from error
    entries.sort(key=lambda entry: entry.start)
    end = max((entry.end for entry in entries), default=8 + length)
    if end != size:
        raise ModelError(f"{path}: got {size} bytes, wanted {end}, as the header says (truncated?)")
    # Tensors over each other would let a small file stand for a huge one; bytes that no tensor has could be anything.
    for before, entry in pairwise([TensorEntry("", "U8", (0,), 8 + length, 8 + length), *entries]):
        if entry.start != before.end:
            where = f"at byte {entry.start}, wanted it at {before.end}, where the one before ends"
            raise ModelError(f"{path}: got tensor {entry.name[:200]} {where}")
    return entries


def _entry(name: str, field: Any, offset: int) -> TensorEntry:
    """Read one field of a header; ValueError if it contradicts itself."""
    shape = tuple(int(extent) for extent in field["shape"])
    start, end = (int(value) for value in field["data_offsets"])
    dtype = str(field["dtype"])
    if dtype not in _WIDTHS or min(shape, default=0) < 0 or start < 0:
        raise ValueError(f"tensor {name}: {dtype} {list(shape)} at {start}")
    if end - start != math.prod(shape) * _WIDTHS[dtype]:
        raise ValueError(f"tensor {name}: {end - start} bytes for {dtype} {list(shape)}")
    return TensorEntry(name, dtype, shape, offset + start, offset + end)


def check_finite(path: Path) -> list[TensorEntry]:
    """Return the tensors of a file, all of whose numbers are finite.

    Raises
    ------
    ModelError
        As `read_header`; or if a tensor holds NaN or infinite numbers: it is named.
    """
    entries = read_header(path)
    for entry in entries:
        if entry.dtype in _EXPONENTS and entry.count:
            bad = sum(int(np.count_nonzero(_not_finite(bits, entry.dtype))) for bits in _bits(path, entry))
            if bad:
                raise ModelError(
                    f"{path}: got {bad} of {entry.count} values NaN or infinite in {entry.name}, wanted finite weights"
                )
    return entries


def _bits(path: Path, entry: TensorEntry) -> Iterator[NDArray[Any]]:
    """Yield a tensor's numbers as unsigned integers of the same bits, some at a time: memory stays flat."""
    with path.open("rb") as file:
        for start in range(entry.start, entry.end, _CHUNK_BYTES):
            file.seek(start)
            yield np.frombuffer(file.read(min(_CHUNK_BYTES, entry.end - start)), f"<u{_WIDTHS[entry.dtype]}")


def _not_finite(bits: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    """Say which numbers are NaN or infinite, by their bits."""
    exponent = bits.dtype.type(_EXPONENTS[dtype])
    return (bits & exponent) == exponent
