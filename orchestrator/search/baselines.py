"""What a front is compared with: uniform widths, and the bits that methods' own rules give, with the same passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pydantic import ValidationError

from orchestrator.planning.formats import choose_formats
from orchestrator.planning.model import ModelInfo
from orchestrator.recipes.load import load_recipe
from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.enums import AllocationMethod, Granularity
from quant_spec.messages import first_problem
from quant_spec.passes.allocate import ALLOCATED_BITS, Allocate
from quant_spec.recipe import Recipe
from quant_spec.search import BASE_VARIANT

#: Shipped recipes that the methods' rules are taken from.
_STEP_BITS, _ALLOCATE = "ptqd-w4-mixed", "mpqdm-w4a4"
_EXCEPTIONS = {"qdiffusion-exceptions": "qdiffusion-w4a8", "tfmq-exceptions": "tfmq-w4a8"}
#: Bits that channels get around, where the base recipe's do not allow for it.
_MIDDLE_BITS = 4


def method_recipes(base: Recipe, left_out: Callable[[str], None]) -> dict[str, Recipe]:
    """Return the base recipe with each method's own choice of bits, by the name of the method's rule.

    Parameters
    ----------
    base
        Whose passes, formats and evaluation each has.
    left_out
        Told of each that the base recipe has no room for, and why.
    """
    made: dict[str, Recipe] = {}
    for name, make in _METHODS.items():
        try:
            made[name] = make(base)
        except ValidationError as error:
            left_out(f"baseline {name} is left out: {first_problem(error, Recipe)}")
    return made


def uniform_points(
    model: ModelInfo, recipe: Recipe, widths: Sequence[int], fixed: Sequence[str]
) -> Iterator[tuple[str, Allocation]]:
    """Yield an allocation for each width: all layers at it whose bits no exception of the recipe states.

    Parameters
    ----------
    fixed
        Layers that stay as the recipe says.
    """
    layers = [name for name in plain_layers(model, recipe) if name not in set(fixed)]
    for bits in widths:
        choices = {name: LayerChoice.model_validate({"weight_bits": bits}) for name in layers}
        yield f"uniform-{bits}", Allocation(variant=BASE_VARIANT, layers=choices)


def plain_layers(model: ModelInfo, recipe: Recipe) -> list[str]:
    """Return the layers whose weight bits are the recipe's `weights.bits`: those that follow when these change."""
    other = next(bits for bits in (8, 6) if bits != recipe.weights.bits)
    plain = recipe.replaced(passes=recipe.passes.replaced(allocate=None))
    changed = plain.replaced(weights=recipe.weights.replaced(bits=other))
    before, after = ({name: layer.weight.bits for unit in choose_formats(model, each)
                      for name, layer in unit.planned.layers.items()} for each in (plain, changed))  # fmt: skip
    return [name for name, bits in before.items() if after[name] != bits]


def _step_bits(base: Recipe) -> Recipe:
    """PTQD: activation bits by trajectory step."""
    rule = load_recipe(_STEP_BITS).recipe.activations.step_bits
    return base.replaced(activations=base.activations.replaced(step_bits=rule))


def _allocated(method: AllocationMethod) -> Callable[[Recipe], Recipe]:
    """MPQ-DM: weight bits by output channel."""

    def make(base: Recipe) -> Recipe:
        rule = load_recipe(_ALLOCATE).recipe.passes.allocate or Allocate()
        bits = base.weights.bits if base.weights.bits in ALLOCATED_BITS else _MIDDLE_BITS
        weights = base.weights.replaced(bits=bits, granularity=Granularity.PER_CHANNEL, group_size=None)
        return base.replaced(
            weights=weights, passes=base.passes.replaced(allocate=rule.replaced(method=method), reconstruct=None)
        )

    return make


def _exceptions(shipped: str) -> Callable[[Recipe], Recipe]:
    """Q-Diffusion, TFMQ-DM: more bits for named layers."""

    def make(base: Recipe) -> Recipe:
        bits = base.weights.bits if base.weights.bits < max(_MIDDLE_BITS, 8) else _MIDDLE_BITS
        return base.replaced(weights=base.weights.replaced(bits=bits), layers=load_recipe(shipped).recipe.layers)

    return make


_METHODS: dict[str, Callable[[Recipe], Recipe]] = {
    "ptqd-step-bits": _step_bits,
    "mpqdm-kurtosis": _allocated(AllocationMethod.KURTOSIS),
    "mpqdm-global": _allocated(AllocationMethod.GLOBAL),
    **{name: _exceptions(shipped) for name, shipped in _EXCEPTIONS.items()},
}
