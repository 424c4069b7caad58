"""The size of a pipeline's images on the command line: 512, or 512x768 (height before width)."""

from __future__ import annotations

from typing import Any

import click

from quant_spec.errors import InvalidInputError
from quant_spec.prompts import parse_size


class ImageSize(click.ParamType[tuple[int, int]]):
    """`N` for a square, or `HxW`, in pixels."""

    name = "N|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return height and width."""
        if not isinstance(value, str):
            return tuple(value)
        try:
            return parse_size(value)
        except InvalidInputError as error:
            self.fail(str(error), param, ctx)


image_size_option = click.option(
    "--size",
    type=ImageSize(),
    help="Height and width of a whole pipeline's images in pixels, where not its own.",
)
