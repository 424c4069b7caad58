"""Menu: round every layer once at each width of a menu, so that any choice among them costs nothing more."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from quant_spec.record import Bits, Record

_Widths = Annotated[tuple[Bits, ...], Field(max_length=6)]


class Menu(Record):
    """Round every layer once at each width, in the base recipe's formats; exact names in `layers` choose from them.

    The bits that patterns give are on the menu too. Channels are scaled (`passes.scale`) once, for the base's bits.
    """

    weight_bits: Annotated[_Widths, Field(min_length=1)] = Field(
        default=(2, 3, 4, 5, 6, 8), description="Weight bits that layers can choose from."
    )
    activation_bits: _Widths = Field(
        default=(), description="Activation bits that layers, and attentions, can choose from; [] leaves the base's."
    )

    @model_validator(mode="after")
    def _rises(self) -> Self:
        for name, widths in (("weight_bits", self.weight_bits), ("activation_bits", self.activation_bits)):
            if list(widths) != sorted(set(widths)):
                raise ValueError(f"{name}: got {list(widths)}, wanted different bits in rising order")
        return self
