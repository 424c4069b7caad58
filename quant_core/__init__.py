"""The science of low-bit diffusion models. Importing it registers the method "quantmill" with diffusers."""

from quant_core.corrected_scheduler import QuantmillCorrectedScheduler
from quant_core.diffusers_quantizer import register
from quant_core.loader import load_quantized
from quant_core.runtime import layer_runs
from quant_core.runtime_layer import LayerRun

register()

__all__ = ["LayerRun", "QuantmillCorrectedScheduler", "layer_runs", "load_quantized"]
