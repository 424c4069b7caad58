"""The table of kinds of task; each has a file in `quant_spec.tasks`."""

from __future__ import annotations

from quant_spec.task import TaskKind
from quant_spec.tasks import (
    allocate,
    bench,
    calibrate,
    card,
    channel_errors,
    correct,
    distill,
    encode,
    evaluate,
    export,
    inspect,
    layer_table,
    noise,
    noop,
    pack,
    reconstruct,
    reference,
    release,
    round,
    scale,
    score,
    step_bits,
    step_effects,
    temporal,
)

_MODULES = (
    *(
        inspect,
        encode,
        calibrate,
        reference,
        temporal,
        scale,
        round,
        reconstruct,
        step_effects,
        step_bits,
        channel_errors,
    ),
    *(allocate, distill, pack, noise, correct, evaluate, score, release),
    *(export, bench, layer_table, card),  # run at once for the command line, not queued
    noop,  # neither computes nor needs a model: measures the queue and drills its recovery
)

#: Name to kind.
KINDS: dict[str, TaskKind] = {module.KIND.name: module.KIND for module in _MODULES}
