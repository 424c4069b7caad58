"""LoRA files on the command line: FILE, or FILE:0.8."""

from __future__ import annotations

from typing import Any

import click

from orchestrator.actions.lora import Lora


class LoraFile(click.ParamType[Lora]):
    """A safetensors file, and behind a colon how much of it is added."""

    name = "FILE[:SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lora:
        """Return the file and the scale; what is wrong with them is said as of any other input."""
        return value if isinstance(value, Lora) else Lora.parse(str(value))


lora_option = click.option(
    "--lora",
    "loras",
    type=LoraFile(),
    multiple=True,
    help="LoRA to add to a whole pipeline's weights first, by so much (1 by default); may be repeated.",
)
