"""Prompts files: what a pipeline is told for each sample, one line each.

Three forms, told apart by their first line: plain text, one prompt (or one class label) a line; TSV, whose first line
names the columns; JSON lines, one object a line. The columns, and the keys, are `prompt`, `negative_prompt`,
`class_label`, `seed` and `size` (of the image: pixels of its side, or height x width as in 512x768; the same in all
lines), and any other keyword of a pipeline's call: its values are text, or the names of image files
or of arrays (.npy). Empty lines, and lines of plain text that begin with #, are skipped. A line ends as files' lines do
(LF, CR LF or CR), not at the other characters that Unicode counts as ends. What looks like CSV or a JSON array is
refused: read as plain text, its header or brackets would be prompts.

A file that names others is kept with them as one *bundle*: a zip archive of the text, `prompts`, and of the files.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from quant_spec.errors import InvalidInputError

_COLUMNS = ("prompt", "negative_prompt", "class_label", "seed", "size")
_END = re.compile(r"\r\n|\n|\r")
_SIZE = re.compile(r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?")
_MOST_LINES, _LONGEST, _DIGITS = 1_000_000, 10_000, 100
#: Bytes of a prompts file, without the files that it names.
LONGEST_FILE = 100 << 20
#: What no tokenizer, database or page takes: NUL, and halves of a character.
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
_TEXT, _FILES = "prompts", "files/"
#: What names of image files and of arrays end with.
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ARRAY = ".npy"
#: Keywords of calls whose values are never text, and texts that are none.
_OF_FILES, _NUMBER = re.compile(r"(\w+_)?(image|mask|embeds|latents)"), re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?")
_NO_NUMBER = (
    "wanted text or the name of a file; what is the same for all lines goes into the recipe's sampler.arguments, and "
    "columns of numbers are class_label, seed and size"
)


class PromptPart(StrEnum):
    """Which prompts of a file: what a model is fitted to must not be what it is measured on."""

    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True)
class PromptFile:
    """An image or an array that a line names; `data` is empty where the file is not there yet."""

    name: str
    data: bytes = b""

    @property
    def is_image(self) -> bool:
        """Whether it is an image, and not an array."""
        return not self.name.lower().endswith(ARRAY)


@dataclass(frozen=True, slots=True)
class PromptLine:
    """What a pipeline is told for one sample; `seed`, and `size` (height, width), go before the recipe's.

    `more` are further keywords of its call, in the order of their names, with text or files.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: int | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    more: tuple[tuple[str, str | PromptFile], ...] = ()

    @property
    def files(self) -> tuple[PromptFile, ...]:
        """The files that it names."""
        return tuple(value for _, value in self.more if isinstance(value, PromptFile))

    @property
    def text(self) -> str:
        """What people are shown: the prompt, the label, or the files."""
        if self.prompt is not None:
            return self.prompt
        return ", ".join(file.name for file in self.files) if self.class_label is None else f"class {self.class_label}"


def read_prompts(data: bytes, where: str = "prompts") -> tuple[PromptLine, ...]:
    """Read a prompts file.

    Parameters
    ----------
    data
        Its bytes, UTF-8, or a bundle's.
    where
        What messages call it.

    Raises
    ------
    InvalidInputError
        Naming the first line that is wrong, what it has and what was wanted.
    """
    data, files = _unpack(data, where)
    # Counted before anything is made of them, as a line of one letter takes 100 bytes.
    count = data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
    if count > _MOST_LINES:
        raise InvalidInputError(f"{where}: got {count} lines, wanted at most {_MOST_LINES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{where}: got bytes that are not UTF-8 (at {error.start}), wanted text") from None
    rows = [(number, row) for number, row in enumerate(_END.split(text), 1) if row.strip()]
    lines = tuple(_lines(rows, where))
    if not lines:
        raise InvalidInputError(f"{where}: got no prompts, wanted one a line")
    if len({(line.prompt is None, line.class_label is None) for line in lines}) > 1:
        raise InvalidInputError(f"{where}: got prompts and class labels, wanted one of them in every line")
    sizes = sorted({(0, 0) if line.size is None else line.size for line in lines})
    if len(sizes) > 1:
        got = ", ".join("none" if size == (0, 0) else "{}x{}".format(*size) for size in sizes)
        raise InvalidInputError(f"{where}: got sizes {got}, wanted the same in every line: a job is of one")
    columns = [{name for name, _ in line.more} for line in lines]
    if uneven := sorted(columns[0].union(*columns) - columns[0].intersection(*columns)):
        raise InvalidInputError(f"{where}: got {', '.join(uneven)} in some lines, wanted them in all or none")
    return tuple(_with_files(line, files, where) for line in lines) if files else lines


def bundle(data: bytes, files: Mapping[str, bytes]) -> bytes:
    """Return one archive of a prompts file and the files that it names; the same bytes for the same content."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for name, content in ((_TEXT, data), *((f"{_FILES}{name}", files[name]) for name in sorted(files))):
            packed.writestr(zipfile.ZipInfo(name), content)
    return archive.getvalue()


def _unpack(data: bytes, where: str) -> tuple[bytes, dict[str, bytes]]:
    """Return a prompts file's text, and the files of a bundle by name."""
    if not data.startswith(b"PK\x03\x04"):
        return data, {}
    found = _members(data, where)
    return found.pop(_TEXT), {name.removeprefix(_FILES): content for name, content in found.items()}


def unbundle(data: bytes, where: str) -> dict[str, bytes]:
    """Return the files of a bundle by name.

    Raises
    ------
    InvalidInputError
        If it is none, or a name is not that of a file in a folder.
    """
    files = {name.removeprefix(_FILES): content for name, content in _members(data, where).items() if name != _TEXT}
    if wrong := [name for name in files if PurePosixPath(name).name != name]:
        raise InvalidInputError(f"{where}: got a file {wrong[0]!r}, wanted names without folders")
    return files


def _members(data: bytes, where: str) -> dict[str, bytes]:
    """Return all that a bundle holds."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            if any(info.compress_type != zipfile.ZIP_STORED for info in packed.infolist()):
                raise InvalidInputError(f"{where}: got a compressed archive, wanted a bundle")
            found = {name: packed.read(name) for name in packed.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise InvalidInputError(f"{where}: got an archive that is no bundle ({error}), wanted one of ours") from None
    if _TEXT not in found:
        raise InvalidInputError(f"{where}: got an archive without {_TEXT}, wanted a bundle")
    return found


def _with_files(line: PromptLine, files: Mapping[str, bytes], where: str) -> PromptLine:
    """Return a line with the content of its files."""
    if missing := [file.name for file in line.files if file.name not in files]:
        raise InvalidInputError(f"{where}: got {missing[0]} named but not in the bundle, wanted all files in it")
    return replace(
        line,
        more=tuple(
            (name, PromptFile(value.name, files[value.name]) if isinstance(value, PromptFile) else value)
            for name, value in line.more
        ),
    )


def _lines(rows: Sequence[tuple[int, str]], where: str) -> Iterator[PromptLine]:
    """Read lines by the form that the first of them has."""
    if not rows:
        return
    first = rows[0][1].strip()
    columns = [name.strip() for name in first.split("\t")]
    if first.startswith("{"):
        for number, row in rows:
            yield _line(_object(row, f"{where}:{number}"), f"{where}:{number}")
    elif first.startswith("[") and _is_array("\n".join(row for _, row in rows)):
        raise InvalidInputError(f"{where}: got a JSON array, wanted JSON lines: an object in each line")
    elif _is_csv_header(first):
        raise InvalidInputError(f"{where}: got columns with commas between them ({first}), wanted tabs, or JSON lines")
    elif {"prompt", "class_label"} & set(columns) or (len(columns) > 1 and all(map(str.isidentifier, columns))):
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise InvalidInputError(f"{where}: got column {', '.join(twice)} more than once, wanted each once")
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
            yield _line({"class_label": _number(row)} if labels else {"prompt": row}, f"{where}:{number}")


def _object(row: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(row, object_pairs_hook=lambda pairs: _without_doubles(pairs, where))
    except InvalidInputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where}: got what is no JSON ({error}), wanted an object") from None
    if not isinstance(value, dict):
        raise InvalidInputError(f"{where}: got a JSON {type(value).__name__}, wanted an object")
    return value


def _without_doubles(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise InvalidInputError(
            f"{where}: got a key more than once ({', '.join(key for key, _ in pairs)}), wanted once"
        )
    return value


def _is_csv_header(text: str) -> bool:
    names = {name.strip(' "') for name in text.split(",")}
    return len(names) > 1 and names <= set(_COLUMNS)


def _is_array(text: str) -> bool:
    """Whether a text is a JSON array, and not a prompt in brackets."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


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
    """Return the number that a text is; the text, where it is none, or has more digits than any that is taken."""
    return int(text) if text.isdecimal() and len(text) <= _DIGITS else text


def _line(stated: Mapping[str, Any], where: str) -> PromptLine:
    """Check one line."""
    more = tuple(_more(name, stated[name], where) for name in sorted(stated.keys() - set(_COLUMNS)))
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
    for name, value in stated.items():
        if isinstance(value, str) and (wrong := _NO_TEXT.search(value)) is not None:
            raise InvalidInputError(f"{where}: got {name} with the character {wrong[0]!r}, wanted text")
    told = [name for name in ("prompt", "class_label") if stated.get(name) is not None]
    line = PromptLine(**{name: value for name, value in stated.items() if name in _COLUMNS}, more=more)
    if len(told) > 1 or not (told or line.files):
        raise InvalidInputError(
            f"{where}: got {', '.join(sorted(stated)) or 'nothing'}, wanted a prompt or a class_label"
        )
    return line


def _more(name: str, value: Any, where: str) -> tuple[str, str | PromptFile]:
    """Check a further keyword of a pipeline's call."""
    if not name.isidentifier():
        raise InvalidInputError(f"{where}: got column {name[:40]!r}, wanted a keyword of the pipeline's call")
    if not (isinstance(value, str) and len(value) <= _LONGEST):
        raise InvalidInputError(f"{where}: got {name} {str(value)[:40]}, {_NO_NUMBER}")
    if not value.lower().endswith((*IMAGES, ARRAY)):
        if _OF_FILES.fullmatch(name):
            raise InvalidInputError(
                f"{where}: got {name} {value[:200]!r}, wanted the name of a file ({', '.join((*IMAGES, ARRAY))})"
            )
        if "prompt" not in name and _NUMBER.fullmatch(value):
            raise InvalidInputError(f"{where}: got {name} {value[:40]}, {_NO_NUMBER}")
        return name, value
    if PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts:
        raise InvalidInputError(f"{where}: got {name} {value[:200]!r}, wanted a file in the folder of the prompts file")
    return name, PromptFile(value)


def select_part(lines: Sequence[PromptLine], part: PromptPart) -> tuple[PromptLine, ...]:
    """Return the lines that one part of a job uses.

    The first, third, ... calibrate, the second, fourth, ... evaluate. A single line, and class labels, which are all
    that there is to a model that takes them, are used by both; their seeds differ.
    """
    if len(lines) == 1 or lines[0].class_label is not None:
        return tuple(lines)
    return tuple(lines[0::2] if part is PromptPart.CALIBRATION else lines[1::2])


def line_of(lines: Sequence[PromptLine], seed: int) -> PromptLine:
    """Return what the sample of a seed is told."""
    return lines[seed % len(lines)]


def seed_of(line: PromptLine, seed: int) -> int:
    """Return the seed that a sample is drawn with: its line's own, where that has one."""
    return seed if line.seed is None else line.seed
