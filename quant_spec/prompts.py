"""Prompts files: what a pipeline is told for each sample, one line each.

Three forms, told apart by their first line: plain text, one prompt (or one class label) a line; TSV, whose first line
names the columns; JSON lines, one object a line. The columns, and the keys, are `prompt`, `negative_prompt`,
`class_label`, `seed` and `size` (of the image: pixels of its side, or height x width as in 512x768; the same in all
lines). Empty lines, and lines of plain text that begin with #, are skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from quant_spec.errors import InvalidInputError

_COLUMNS = ("prompt", "negative_prompt", "class_label", "seed", "size")
_SIZE = re.compile(r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?")
_MOST_LINES, _LONGEST = 1_000_000, 10_000


class PromptPart(StrEnum):
    """Which prompts of a file: what a model is fitted to must not be what it is measured on."""

    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True)
class PromptLine:
    """What a pipeline is told for one sample; `seed`, and `size` (height, width), go before the recipe's."""

    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: int | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None

    @property
    def text(self) -> str:
        """What people are shown: the prompt, or the label."""
        return self.prompt if self.prompt is not None else f"class {self.class_label}"


def read_prompts(data: bytes, where: str = "prompts") -> tuple[PromptLine, ...]:
    """Read a prompts file.

    Parameters
    ----------
    data
        Its bytes, UTF-8.
    where
        What messages call it.

    Raises
    ------
    InvalidInputError
        Naming the first line that is wrong, what it has and what was wanted.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{where}: got bytes that are not UTF-8 (at {error.start}), wanted text") from None
    rows = [(number, row) for number, row in enumerate(text.splitlines(), 1) if row.strip()]
    if len(rows) > _MOST_LINES:
        raise InvalidInputError(f"{where}: got {len(rows)} lines, wanted at most {_MOST_LINES}")
    lines = tuple(_lines(rows, where))
    if not lines:
        raise InvalidInputError(f"{where}: got no prompts, wanted one a line")
    kinds = {line.prompt is None for line in lines}
    if len(kinds) > 1:
        raise InvalidInputError(f"{where}: got prompts and class labels, wanted one of them in every line")
    sizes = sorted({(0, 0) if line.size is None else line.size for line in lines})
    if len(sizes) > 1:
        got = ", ".join("none" if size == (0, 0) else "{}x{}".format(*size) for size in sizes)
        raise InvalidInputError(f"{where}: got sizes {got}, wanted the same in every line: a job is of one")
    return lines


def _lines(rows: Sequence[tuple[int, str]], where: str) -> Iterator[PromptLine]:
    """Read lines by the form that the first of them has."""
    if not rows:
        return
    first = rows[0][1].strip()
    columns = [name.strip() for name in first.split("\t")]
    if first.startswith("{"):
        for number, row in rows:
            yield _line(_object(row, f"{where}:{number}"), f"{where}:{number}")
    elif {"prompt", "class_label"} & set(columns):
        for number, row in rows[1:]:
            cells = row.split("\t")
            if len(cells) != len(columns):
                raise InvalidInputError(f"{where}:{number}: got {len(cells)} columns, wanted {len(columns)}")
            stated = {name: cell.strip() for name, cell in zip(columns, cells, strict=True) if cell.strip()}
            yield _line(
                {k: _number(v) if k in ("class_label", "seed") else v for k, v in stated.items()}, f"{where}:{number}"
            )
    else:
        plain = [(number, row.strip()) for number, row in rows if not row.startswith("#")]
        labels = all(row.isdecimal() for _, row in plain)
        for number, row in plain:
            yield _line({"class_label": int(row)} if labels else {"prompt": row}, f"{where}:{number}")


def _object(row: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where}: got what is no JSON ({error}), wanted an object") from None
    if not isinstance(value, dict):
        raise InvalidInputError(f"{where}: got a JSON {type(value).__name__}, wanted an object")
    return value


def parse_size(text: str) -> tuple[int, int]:
    """Return the height and width that N or HxW says.

    Raises
    ------
    InvalidInputError
        If it says none.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InvalidInputError(f"size: got {text[:40]!r}, wanted pixels above 0, or height and width as in 512x768")
    return int(found[1]), int(found[2] or found[1])


def _number(text: str) -> Any:
    return int(text) if text.isdecimal() else text


def _line(stated: Mapping[str, Any], where: str) -> PromptLine:
    """Check one line."""
    if unknown := sorted(stated.keys() - set(_COLUMNS)):
        raise InvalidInputError(f"{where}: got {', '.join(unknown)}, wanted some of {', '.join(_COLUMNS)}")
    for name in ("prompt", "negative_prompt"):
        value = stated.get(name)
        if value is not None and not (isinstance(value, str) and len(value) <= _LONGEST):
            raise InvalidInputError(
                f"{where}: got {name} {str(value)[:40]!r}, wanted text of at most {_LONGEST} letters"
            )
    for name in ("class_label", "seed"):
        value = stated.get(name)
        if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62):
            raise InvalidInputError(f"{where}: got {name} {str(value)[:40]!r}, wanted a number from 0")
    if (size := stated.get("size")) is not None:
        try:
            stated = {**stated, "size": parse_size(str(size))}
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}: {error}") from None
    if (stated.get("prompt") is None) == (stated.get("class_label") is None):
        raise InvalidInputError(
            f"{where}: got {', '.join(sorted(stated)) or 'nothing'}, wanted a prompt or a class_label"
        )
    return PromptLine(**stated)


def select_part(lines: Sequence[PromptLine], part: PromptPart) -> tuple[PromptLine, ...]:
    """Return the lines that one part of a job uses.

    The first, third, ... calibrate, the second, fourth, ... evaluate. A single line, and class labels, which are all
    that there is to a model that takes them, are used by both; their seeds differ.
    """
    if len(lines) == 1 or lines[0].prompt is None:
        return tuple(lines)
    return tuple(lines[0::2] if part is PromptPart.CALIBRATION else lines[1::2])


def line_of(lines: Sequence[PromptLine], seed: int) -> PromptLine:
    """Return what the sample of a seed is told."""
    return lines[seed % len(lines)]
