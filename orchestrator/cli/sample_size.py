"""The size of a sample on the command line: 64, or 64x96."""

from __future__ import annotations

import re
from typing import Any

import click

_SIZE = re.compile(r"[1-9][0-9]{0,6}(x[1-9][0-9]{0,6}){0,2}")


class SampleSize(click.ParamType[int | tuple[int, ...]]):
    """`N` for a square (or the length of a signal), `HxW`, or `FxHxW` for video."""

    name = "N|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, ...]:
        """Return a number, or one number for each dimension."""
        if not isinstance(value, str):
            return value
        if not _SIZE.fullmatch(value):
            self.fail(f"got {value!r}, wanted a whole number above 0, or two as in 64x96", param, ctx)
        sizes = tuple(int(part) for part in value.split("x"))
        return sizes[0] if len(sizes) == 1 else sizes


sample_size_option = click.option(
    "--sample-size",
    type=SampleSize(),
    help="Size of a sample, without channels, for a model whose config leaves it open; of latents, not of images.",
)
