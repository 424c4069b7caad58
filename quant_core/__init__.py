"""The science of low-bit diffusion models. Importing it registers "quantmill" with diffusers, and with transformers."""

from importlib.util import find_spec

from quant_core.artifact.diffusers_quantizer import register
from quant_core.corrected_scheduler import QuantmillCorrectedScheduler
from quant_core.runtime.build import layer_runs
from quant_core.runtime.layer import LayerRun
from quant_core.runtime.loader import load_quantized

register()
if find_spec("transformers") is not None:  # for text encoders; diffusers has imported it already
    from quant_core.artifact.transformers_quantizer import register as register_with_transformers

    register_with_transformers()

__all__ = ["LayerRun", "QuantmillCorrectedScheduler", "layer_runs", "load_quantized"]
