"""Where saved pipelines look for their scheduler's class: `model_index.json` files name this module.

diffusers only loads a component of a module that is imported, and whose namespace has the base class too.
"""

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from quant_core.diffusion.corrected_scheduler import QuantmillCorrectedScheduler

__all__ = ["QuantmillCorrectedScheduler", "SchedulerMixin"]
