"""The science of low-bit diffusion models. Importing it registers the method "quantmill" with diffusers."""

from quant_core.artifact.diffusers_quantizer import register
from quant_core.diffusion.corrected_scheduler import QuantmillCorrectedScheduler
from quant_core.runtime.build import layer_runs
from quant_core.runtime.layer import LayerRun
from quant_core.runtime.loader import load_quantized

register()

__all__ = ["LayerRun", "QuantmillCorrectedScheduler", "layer_runs", "load_quantized"]
