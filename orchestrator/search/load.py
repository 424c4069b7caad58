"""From a search's file to what is asked for: the spec, its base recipe and variants, a table of latencies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import RecipeError, SearchError
from orchestrator.recipes.files import assign
from orchestrator.recipes.load import LoadedRecipe, load_recipe, resolve
from orchestrator.recipes.yaml_text import LONGEST, parse_yaml
from orchestrator.search.baselines import method_recipes
from quant_spec.documents import read_json_file, read_plain_file
from quant_spec.keys import canonical_json
from quant_spec.messages import first_problem, shown
from quant_spec.recipe import Recipe
from quant_spec.search import BASE_VARIANT, SearchSpec
from workers.storage.plain_files import file_within

#: What says nothing about the outcome for a model.
_UNDIGESTED = ("description", "models")


@dataclass(frozen=True, slots=True)
class LoadedSearch:
    """A search as it was asked for.

    Attributes
    ----------
    spec
        The search's file.
    folder
        Where it lies: relative folders of models start there.
    recipes
        The base recipe and its variants by name, then the methods' own allocations.
    latency
        The table of latencies, if there is one.
    """

    spec: SearchSpec
    folder: Path
    recipes: Mapping[str, LoadedRecipe]
    latency: dict[str, Any] | None = None
    left_out: tuple[str, ...] = field(default=())

    @property
    def files(self) -> dict[str, Path | bytes]:
        """Files that the recipes refer to, by digest."""
        return {digest: path for loaded in self.recipes.values() for digest, path in loaded.files.items()}

    def recipes_json(self) -> dict[str, Any]:
        """Return the recipes, resolved, as JSON."""
        return {name: json.loads(resolve(loaded.recipe).json) for name, loaded in self.recipes.items()}


def load_search(reference: str, overrides: Sequence[str] = (), *, allowed: Sequence[Path] = ()) -> LoadedSearch:
    """Load a search from its file.

    Parameters
    ----------
    reference
        The file, YAML.
    overrides
        Assignments `a.b=v` that go on top, in order; v is YAML.
    allowed
        Folders that files may be named in, besides the one that the search lies in.

    Raises
    ------
    SearchError
        If it cannot be read or asks for what cannot be.
    RecipeError
        If its base recipe or a variant of it is not valid.
    """
    path = Path(reference).expanduser().absolute()
    values = _read(path)
    values.setdefault("name", path.stem.lower())
    for override in overrides:
        values = assign(values, override)
    spec = spec_from_json(values)
    recipes = {}
    for variant in spec.space.variant_names():
        assignments = [f"{name}={json.dumps(value)}" for name, value in spec.assignments(variant)]
        try:
            recipes[variant] = load_recipe(spec.recipe, assignments, folder=path.parent, allowed=allowed)
        except RecipeError as error:
            where = "recipe" if variant == BASE_VARIANT else f"space.variants.{variant}"
            raise SearchError(f"search {path.name}: {where}: {error}") from error
        _check_recipe(spec, recipes[variant].recipe)
        if variant != BASE_VARIANT and recipes[variant].recipe == recipes[BASE_VARIANT].recipe:
            raise SearchError(f"space.variants.{variant}: got what the base recipe says, wanted another recipe")
    left_out: list[str] = []
    if spec.baselines:
        base = recipes["base"]
        made = method_recipes(base.recipe, left_out.append)
        recipes |= {name: LoadedRecipe(recipe, base.files) for name, recipe in made.items()}
    latency = None if spec.latency_table is None else _read_latency(spec, path.parent, allowed)
    return LoadedSearch(spec, path.parent, recipes, latency, tuple(left_out))


def spec_from_json(values: Mapping[str, Any]) -> SearchSpec:
    """Check a search that is given as JSON values.

    Raises
    ------
    SearchError
        If it is not valid.
    """
    try:
        return SearchSpec.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise SearchError(f"search: {first_problem(error, SearchSpec)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise SearchError(f"search: got a value that JSON cannot hold ({error})") from error


def search_digest(
    spec: SearchSpec, recipes: Mapping[str, Any], models: Sequence[str], latency: Any, only: str | None
) -> str:
    """Name all that decides the outcome of a search: the spec, what its recipes say, the models' digests."""
    plain = {name: value for name, value in spec.model_dump(mode="json").items() if name not in _UNDIGESTED}
    asked = {"spec": plain, "recipes": recipes, "models": sorted(models), "latency": latency, "only": only}
    return hashlib.sha256(canonical_json(asked).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """Read a search's file."""
    what = f"search {path.name}"
    try:
        text = read_plain_file(path, LONGEST, error=SearchError, what=what).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SearchError(f"search {path}: got {reason}, wanted a readable YAML file") from error
    values = parse_yaml(text, what)
    if not isinstance(values, dict):
        raise SearchError(f"{what}: got {shown(values)}, wanted a mapping")
    return values


def _check_recipe(spec: SearchSpec, recipe: Recipe) -> None:
    """Refuse a base recipe with which the space makes no sense, and screening on seeds of another stage."""
    space, steps = spec.space, recipe.sampler.num_inference_steps
    if recipe.budget.weight_bits_mean is not None:
        raise SearchError("recipe: got budget.weight_bits_mean, wanted null; a search has budgets of its own")
    if space.activation_bits and recipe.activations.bits is None:
        raise SearchError(
            f"space.activation_bits: got {list(space.activation_bits)} with a recipe of weights only, wanted a recipe "
            "with activations.bits"
        )
    for name, mode in recipe.modes.items():
        if space.step_ranges > 1 and mode != "per_step":
            raise SearchError(
                f"space.step_ranges: got {space.step_ranges} with {name} {mode}, wanted per_step: "
                f"set: {{{name}: per_step}}"
            )
    if space.step_ranges > steps:
        raise SearchError(f"space.step_ranges: got {space.step_ranges}, wanted at most the sampler's {steps} steps")
    if not spec.screening.seeds:
        return
    first, held_out = spec.screening.first_seed, recipe.evaluation
    end = first + spec.screening.seeds
    taken = [("evaluation", held_out.first_seed, held_out.seeds)]
    taken.append(("calibration", recipe.calibration.first_seed, recipe.calibration.seeds))
    for name, start, count in taken:
        if first < start + count and start < end:
            raise SearchError(
                f"screening.first_seed: got seeds {first}..{end - 1}, wanted none of {name}'s {start}.."
                f"{start + count - 1}"
            )


def _read_latency(spec: SearchSpec, folder: Path, allowed: Sequence[Path]) -> dict[str, Any]:
    """Read the table of latencies, and refuse that of another device than is asked for."""
    stated = Path(str(spec.latency_table)).expanduser()
    path = file_within(folder / stated, (folder, *allowed), "latency_table", error=SearchError)
    try:
        table = read_json_file(path, error=SearchError, what=f"latency_table {path.name}")
    except FileNotFoundError:
        raise SearchError(f"latency_table: got {stated}, wanted a file that exists") from None
    if not isinstance(table, dict) or not isinstance(table.get("device"), str) or "layers" not in table:
        raise SearchError(f"latency_table {path.name}: got no device and layers, wanted what bench --layers writes")
    if spec.latency_device is not None and table["device"] != spec.latency_device:
        raise SearchError(
            f"latency_table {path.name}: got latencies of {table['device']!r}, wanted those of {spec.latency_device!r} "
            "(latency_device)"
        )
    return table
