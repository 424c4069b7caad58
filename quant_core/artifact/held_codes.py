"""Which layers' codes other tools' formats can hold: those of Linear layers, with nothing beside them."""

from __future__ import annotations

from torch import nn

from quant_core.errors import ArtifactError
from quant_core.nn.layers import QuantLayer


def has_plain_codes(name: str, layer: QuantLayer, holder: str, recipe: str) -> bool:
    """Return whether a layer's codes are to be held; those of a patch embedding are left to floats.

    Parameters
    ----------
    holder, recipe : str
        What is to hold them, and a recipe of which it can, for messages.

    Raises
    ------
    ArtifactError
        If a format of codes alone does not describe the layer.
    """
    spec = layer.spec
    if layer.kind is not nn.Linear:
        if layer.kernel_size != layer.stride:
            size = " x ".join(map(str, layer.kernel_size))
            raise refusal(name, f"a convolution ({size})", holder, "a transformer, whose layers are Linear")
        return False
    if spec.low_rank:
        raise refusal(
            name, f"a low-rank branch of rank {spec.low_rank}", holder, f"none, as {recipe} has (passes.low_rank null)"
        )
    if spec.channel_scale:
        raise refusal(name, "scaled input channels", holder, f"none, as {recipe} has (passes.scale null)")
    return True


def refusal(name: str, got: str, holder: str, wanted: str) -> ArtifactError:
    """Return the error that names a layer, what it has that can't be held, and what would do."""
    return ArtifactError(f"layer {name}: got {got}, which {holder} can't hold; wanted {wanted}")
