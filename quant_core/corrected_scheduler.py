"""Where saved schedulers look for their class: `model_index.json` files name this module."""

from quant_core.diffusion.corrected_scheduler import QuantmillCorrectedScheduler

__all__ = ["QuantmillCorrectedScheduler"]
