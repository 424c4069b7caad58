"""From a reference to a recipe: read its layers, check the whole, give it a digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import RecipeError
from orchestrator.recipes.files import Layer, assign, merge, read_layers, recipe_path, shipped_names
from quant_spec.keys import canonical_json
from quant_spec.messages import first_problem
from quant_spec.recipe import HOW_IT_RUNS, Recipe
from workers.storage.plain_files import file_within

#: What says nothing about the result.
_UNDIGESTED = ("name", "description")
#: Fields that name a file, as paths through the recipe.
_FILE_FIELDS = (("evaluation", "extractor_weights"), ("prompts",))
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe, and the files that it refers to, by digest; they must be in the store when it runs."""

    recipe: Recipe
    files: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Resolved:
    """The one text of a recipe: canonical JSON with every field, and the SHA-256 of it without name and description."""

    json: str
    digest: str


def load_recipe(
    reference: str | Path,
    overrides: Sequence[str] = (),
    *,
    folder: Path | None = None,
    allowed: Sequence[Path] = (),
) -> LoadedRecipe:
    """Load a recipe.

    Parameters
    ----------
    reference
        Name of a shipped recipe, or a file.
    overrides
        Assignments `a.b=v` that go on top, in order; v is YAML.
    folder
        Where relative file names start; the current folder by default.
    allowed
        Folders that recipe files may name files in, besides the one that the recipe lies in. What an override names may
        lie anywhere: it is the user's own word.

    Returns
    -------
    LoadedRecipe
        Its name is that of the file unless the file (not what it extends) states one.

    Raises
    ------
    RecipeError
        If it does not exist, cannot be read, or is not valid: one line that says where, what it got and what it wanted.
    """
    here = Path.cwd() if folder is None else folder.absolute()
    path = recipe_path(str(reference), here)
    layers = read_layers(path, allowed)
    roots = (path.parent, *allowed)
    values: dict[str, Any] = {}
    for layer in layers:
        own = {
            key: value
            for key, value in _anchored(layer, roots).items()
            if layer is layers[-1] or key not in _UNDIGESTED
        }
        values = merge(values, own)
    values.setdefault("name", layers[-1].name)
    for override in overrides:
        values = assign(values, override)
    values, files = _replace_files(values, here)
    return LoadedRecipe(recipe_from_json(values), files)


def recipe_from_json(values: Mapping[str, Any]) -> Recipe:
    """Check a recipe that is given as JSON values, such as a job's.

    Raises
    ------
    RecipeError
        If it is not valid.
    """
    try:
        return Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise RecipeError(first_problem(error, Recipe)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe: got a value that JSON cannot hold ({error})") from error


def resolve(recipe: Recipe) -> Resolved:
    """Return a recipe's canonical JSON and digest."""
    values = recipe.model_dump(mode="json")
    return Resolved(canonical_json(values), recipe_digest(values))


def recipe_digest(values: Mapping[str, Any]) -> str:
    """Return the digest of a recipe that is given as JSON values, every field among them."""
    digested = {key: value for key, value in values.items() if key not in (*_UNDIGESTED, *HOW_IT_RUNS)}
    return hashlib.sha256(canonical_json(digested).encode()).hexdigest()


def shipped_recipes() -> dict[str, Recipe]:
    """Return the recipes that come with Quantmill, by name."""
    return {name: load_recipe(name).recipe for name in shipped_names()}


def _stated(values: Mapping[str, Any], field: Sequence[str]) -> str | None:
    """Return the file that a recipe names in a field, if that is text, and not yet a digest."""
    value: Any = values
    for name in field:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) and value and not _DIGEST.fullmatch(value) else None


def _with(values: Mapping[str, Any], field: Sequence[str], value: str) -> dict[str, Any]:
    """Return a recipe with a field that is there replaced."""
    first, *rest = field
    return {**values, first: _with(values[first], rest, value) if rest else value}


def _anchored(layer: Layer, roots: Sequence[Path]) -> dict[str, Any]:
    """Return what a layer says, its files made independent of where it lies, if those are in a root."""
    values: dict[str, Any] = layer.values
    for field in _FILE_FIELDS:
        stated = _stated(values, field)
        if stated is not None:
            path = layer.folder / Path(stated).expanduser()
            values = _with(values, field, str(file_within(path, roots, ".".join(field), error=RecipeError)))
    return values


def _replace_files(values: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return a recipe with digests for the files that it names, and these by digest."""
    replaced, files = dict(values), {}
    for field in _FILE_FIELDS:
        stated, name = _stated(replaced, field), ".".join(field)
        if stated is None:
            continue
        path = folder / Path(stated).expanduser()
        path = file_within(path, (path.resolve().parent,), name, error=RecipeError)
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise RecipeError(f"{name}: got {stated} ({error.strerror}), wanted a readable file") from error
        replaced, files[digest] = _with(replaced, field, digest), path
    return replaced, files
