"""Layers of a recipe: YAML read strictly, `extends` followed, mappings merged, `--set` on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import RecipeError
from orchestrator.recipes.yaml_text import DEEPEST, LONGEST, parse_yaml
from quant_spec.documents import read_plain_file
from quant_spec.messages import nearest, shown
from workers.storage.plain_files import file_within

_SHIPPED = Path(__file__).parent / "shipped"
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of a recipe: what it says, where relative names in it start, and what it is called."""

    values: dict[str, Any]
    folder: Path
    name: str


def shipped_names() -> list[str]:
    """Return the names of the recipes that come with Quantmill."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def recipe_path(reference: str, folder: Path) -> Path:
    """Return the file that a recipe's reference means: a shipped name, or a file relative to `folder`.

    Raises
    ------
    RecipeError
        If there is neither.
    """
    shipped = _SHIPPED / f"{reference}.yaml"
    if reference in shipped_names():
        return shipped
    path = folder / Path(reference).expanduser()
    if path.is_file():
        return path
    if reference.endswith(_SUFFIXES) or "/" in reference:
        raise RecipeError(f"recipe: got {reference!r}, wanted a file that exists")
    raise RecipeError(
        f"recipe: got {reference!r}, wanted a file or a shipped recipe{nearest(reference, shipped_names())}"
    )


def read_layer(path: Path) -> Layer:
    """Read one recipe file.

    Raises
    ------
    RecipeError
        If it cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = read_plain_file(path, LONGEST, error=RecipeError, what=f"recipe {path}").decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"recipe {path}: got {reason}, wanted a readable YAML file") from error
    values = parse_yaml(text, f"recipe {path}")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path}: got {shown(values)}, wanted a mapping")
    return Layer(values, path.parent, path.stem)


def read_layers(path: Path, allowed: Sequence[Path] = ()) -> list[Layer]:
    """Return a file and all that it extends, the most basic one first.

    What they name lies below the folder of `path`, or in one of `allowed`, links followed; a shipped recipe's name is
    always good.

    Raises
    ------
    RecipeError
        If one of them cannot be read or lies elsewhere, or they extend each other in a circle.
    """
    found: list[Layer] = []
    seen: list[Path] = []
    current: Path | None = path
    while current is not None:
        resolved = current.resolve()
        if resolved in seen:
            names = " -> ".join(p.name for p in [*seen[seen.index(resolved) :], resolved])
            raise RecipeError(f"extends: got a circle ({names}), wanted recipes that end in one without extends")
        seen.append(resolved)
        layer = read_layer(current)
        parent = layer.values.pop("extends", None)
        if parent is not None and not isinstance(parent, str):
            raise RecipeError(
                f"recipe {current}: extends: got {shown(parent)}, wanted a shipped recipe's name or a file"
            )
        found.append(layer)
        current = None
        if parent is not None and parent in shipped_names():
            current = recipe_path(parent, layer.folder)
        elif parent is not None:
            roots = (path.parent, *allowed)
            if parent.endswith(_SUFFIXES) or "/" in parent:
                file_within(layer.folder / Path(parent).expanduser(), roots, "extends", error=RecipeError)
            current = recipe_path(parent, layer.folder)
            file_within(current, roots, "extends", error=RecipeError)
    return found[::-1]


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `upper` over `lower`: mappings merge, anything else replaces, null removes."""
    result = dict(lower)
    for key, value in upper.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            below = result.get(key)
            result[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def assign(values: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Return `values` with one `a.b=v` applied, where v is YAML; a number steps into a list, null removes.

    Raises
    ------
    RecipeError
        If it is not of that form, or steps into something that holds nothing.
    """
    path, equals, text = assignment.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts) or len(parts) > DEEPEST:
        raise RecipeError(f"--set: got {assignment!r}, wanted key=value, such as weights.bits=4")
    value = parse_yaml(text, f"--set {path}")
    result: dict[str, Any] = _assigned(values, parts, value, path)
    return result


def _assigned(holder: Any, parts: Sequence[str], value: Any, path: str, *, inherits: bool = True) -> Any:
    """Return a copy of `holder` with the value at a path; items of a list inherit nothing, so null is a value there."""
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    if isinstance(holder, list):
        if not head.isdecimal() or int(head) >= len(holder):
            raise RecipeError(f"--set {path}: got {head!r}, wanted a position below {len(holder)}")
        items = list(holder)
        items[int(head)] = _assigned(items[int(head)], rest, value, path, inherits=False)
        return items
    if holder is not None and not isinstance(holder, Mapping):
        raise RecipeError(f"--set {path}: got {shown(holder)} before {head!r}, wanted a mapping")
    below = dict(holder or {})
    if not rest and inherits:
        return merge(below, {head: value})
    return below | {head: _assigned(below.get(head), rest, value, path, inherits=inherits)}
