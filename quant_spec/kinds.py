"""The table of kinds of task; each has a file in `quant_spec.tasks`."""

from __future__ import annotations

from quant_spec.task import TaskKind
from quant_spec.tasks import (
    allocate,
    answer,
    bench,
    calibrate,
    card,
    channel_errors,
    choose,
    components,
    correct,
    differences,
    distill,
    encode,
    evaluate,
    exceptions,
    export,
    fuse,
    inspect,
    layer_table,
    layer_times,
    low_rank,
    menu,
    mix,
    noise,
    noop,
    pack,
    propose,
    reconstruct,
    reference,
    rehearse,
    release,
    round,
    scale,
    score,
    sensitivity,
    step_bits,
    step_effects,
    step_gains,
    temporal,
    text_encoder,
    trials,
)

_MODULES = (
    *(inspect, encode, calibrate, reference, temporal, scale, low_rank, round, menu, mix),
    *(answer, reconstruct),
    *(step_effects, step_bits, channel_errors, allocate),
    *(distill, trials, exceptions, differences, pack, noise, correct, evaluate, score, release),
    *(text_encoder, components),  # of a pipeline whose recipe names recipes for its text encoders
    *(step_gains, sensitivity, choose),  # also of searches, but for the last
    propose,  # searches alone
    *(fuse, rehearse, export, bench, layer_table, layer_times, card),  # run at once for the command line, not queued
    noop,  # neither computes nor needs a model: measures the queue and drills its recovery
)

#: Name to kind.
KINDS: dict[str, TaskKind] = {module.KIND.name: module.KIND for module in _MODULES}
