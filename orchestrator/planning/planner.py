"""From a recipe and a model to the graph of tasks.

    model ── calibrate (seeds) ── round (units) ── reconstruct unit 1..B ── pack ── evaluate (seeds) ── score ── release
         │                    └── temporal ─────────────┴────────────────────┘
         └── reference (seeds) ───────────────────────────────────────────────────────┘

The prompts of a whole pipeline are encoded first (`encode`); with `components`, `text_encoder` tasks, `components`
and another `encode` lie beside. If activation bits differ between trajectory steps, `step_effects` (seeds) and
`step_bits` lie between calibrate and round. With the passes `scale`, `low_rank` and `allocate`, `scale` (units),
`low_rank` (units), then `channel_errors` (units) and `allocate`, lie before round; with `menu`, `menu` (units) and
`mix` (units) lie in its place, or with `choose`, `menu` (units), `step_gains`, `sensitivity` (units) and `choose`;
`answer` behind all of these, if codes are for quantized inputs; with `distill`, that task and the trajectories that
it needs between reconstruct and pack, behind `exceptions` if codes are frozen; with `exceptions`, `trials` (units)
and that task after these, but before `answer`; with `differences`, that task before pack; with `correct`, `noise`
(seeds) and `correct` between pack and evaluate.

A task's parameters hold what decides its bytes and nothing else, so that recipes share every task up to where they
differ. Planning is a pure function: no torch, no clock, no database, nothing about the machine. What each kind of task
is told, reads and gives is in its file in `quant_spec.tasks`; which tasks a pass has, in its file in
`orchestrator.planning.passes`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from orchestrator.db.rows import ModelRow
from orchestrator.graph import TaskNode
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.passes.allocate import allocate
from orchestrator.planning.passes.answer import answer
from orchestrator.planning.passes.calibrate import calibrate
from orchestrator.planning.passes.choose import choose
from orchestrator.planning.passes.components import components
from orchestrator.planning.passes.correct import correct
from orchestrator.planning.passes.differences import differences
from orchestrator.planning.passes.distill import distill, distill_frozen
from orchestrator.planning.passes.encode import encode
from orchestrator.planning.passes.evaluate import evaluate
from orchestrator.planning.passes.exceptions import exceptions, exceptions_first
from orchestrator.planning.passes.low_rank import low_rank
from orchestrator.planning.passes.menu import menu
from orchestrator.planning.passes.pack import pack
from orchestrator.planning.passes.reconstruct import reconstruct
from orchestrator.planning.passes.release import release
from orchestrator.planning.passes.round import round_units
from orchestrator.planning.passes.scale import scale
from orchestrator.planning.passes.step_bits import step_bits
from orchestrator.planning.passes.temporal import take_out, temporal
from quant_spec.recipe import Recipe

#: The passes in the order in which they are drawn, which is the order in which a free worker takes tasks.
PASSES: tuple[Callable[[Draft], Drawing], ...] = (
    *(encode, components, calibrate, step_bits, temporal, scale, low_rank, allocate, menu, choose, round_units),
    *(exceptions_first, answer, reconstruct, distill, exceptions, distill_frozen, differences, pack, correct),
    *(evaluate, release),
)


def plan(model: ModelRow, recipe: Recipe, *, released: bool = True) -> tuple[Iterator[TaskNode], TaskNode]:
    """Plan a quantization job.

    Parameters
    ----------
    model
        With its inspection.
    released
        Whether the job ends with a release; else with the figures of the packed model.

    Returns
    -------
    (iterator of TaskNode, TaskNode)
        The tasks, each after all that it depends on, made as they are asked for; and the last of them, the release or
        the score.

    Raises
    ------
    RecipeError
        If the recipe does not fit the model; before anything is returned.
    QuantizationError
        If its scheduler does not.
    """
    draft = take_out(Draft.begin(model, recipe))
    passes = PASSES if released else tuple(draw for draw in PASSES if draw is not release)
    target = deque(_nodes(draft, passes), maxlen=1)[0]
    return _nodes(draft, passes), target


def _nodes(draft: Draft, passes: Sequence[Callable[[Draft], Drawing]]) -> Iterator[TaskNode]:
    """Draw the passes one after another."""
    for draw in passes:
        draft = yield from draw(draft)
