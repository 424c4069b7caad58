"""CONTRIBUTING.md says in which places something new stands; a toy of each is added in exactly these, and works.

All toys are written into one copy of the packages, and looked at there by a Python of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run_cli
from tests.orchestrator.cli.test_search import write_model
from tests.orchestrator.in_process import InProcess
from workers.execution.execute import TaskCall

ROOT = Path(__file__).parents[2]
PACKAGES = ("quant_spec", "kernels", "quant_core", "workers", "orchestrator")
RECORDED = ROOT / "tests" / "orchestrator" / "planning" / "recorded" / "digits.json"


@dataclass(frozen=True)
class Edit:
    """Text of a file that is there, and what stands in its place."""

    old: str
    new: str


def insertion(before: str, text: str) -> Edit:
    """Put text in front of some that is there."""
    return Edit(before, text + before)


#: What is written into a file: all of a new one, or edits.
Change = str | tuple[Edit, ...]


def places(heading: str) -> list[str]:
    """Return the paths that a numbered list of CONTRIBUTING.md names, in order, `<…>` standing for any name."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition(f"### {heading}\n")[2].partition("\n##")[0]
    return re.findall(r"^\d+\. `([^`]+)`", section, flags=re.MULTILINE)


def are_places(paths: list[str], patterns: list[str]) -> bool:
    """Say whether each path is one of the patterns, and each pattern has a path."""
    expressions = [re.sub(r"<[a-z]+>", "[a-z_]+", re.escape(pattern).replace(r"\<", "<")) for pattern in patterns]
    found = [[bool(re.fullmatch(expression, path)) for expression in expressions] for path in paths]
    return all(any(row) for row in found) and all(any(column) for column in zip(*found, strict=True))


def write(root: Path, changes: Mapping[str, Change]) -> None:
    """Make changes to a copy."""
    for name, change in changes.items():
        path = root / name
        if isinstance(change, str):
            path.parent.mkdir(parents=True, exist_ok=True)
            assert not path.exists(), name
            path.write_text(change, encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        for edit in change:
            assert text.count(edit.old) == 1, f"{name}: {edit.old}"
            text = text.replace(edit.old, edit.new)
        path.write_text(text, encoding="utf-8")


PRELUDE = """
import json, os
from pathlib import Path

def planned(*overrides):
    from orchestrator.db.rows import ModelRow
    from orchestrator.planning.planner import plan
    from orchestrator.recipes.load import load_recipe
    row = json.loads(Path(os.environ["RECORDED"]).read_text())
    recipe = load_recipe("base", overrides).recipe
    return list(plan(ModelRow(name="digits", source="/models", **row), recipe)[0])
"""

KEY: dict[str, Change] = {
    "quant_spec/passes/correct.py": (
        insertion(
            "    held_out: bool = Field(",
            '    most_k: Fraction = Field(default=1.0, description="Greatest size of k.")\n',
        ),
        insertion("    scale: bool = Field(", '    _omitted: ClassVar[frozenset[str]] = frozenset({"most_k"})\n\n'),
    ),
    "quant_core/methods/ptqd/correction.py": (
        insertion("    slopes = [found]", "    found = max(-config.most_k, min(config.most_k, found))\n"),
    ),
}


KEY_IS_THERE = """
from orchestrator.recipes.json_schema import json_schema
from orchestrator.recipes.load import load_recipe
from quant_core.methods.ptqd.correction import NoiseMoments, fit
from quant_spec.passes.correct import CorrectFit
import torch

ids = [{node.id for node in planned("passes.correct={}", *more)} for more in ((), ("passes.correct.most_k=0.25",))]
print(len(ids[0] - ids[1]) > 0)
print([node.params["most_k"] for node in planned("passes.correct={most_k: 0.25}") if node.kind == "correct"])
print(any("most_k" in node.params for node in planned("passes.correct={}")))
print(json_schema()["$defs"]["Correct"]["properties"]["most_k"]["description"])
try:
    load_recipe("base", ["passes.correct={most_k: 2}"])
except Exception as error:
    print(error)
x = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)
sums = torch.stack([each.sum() for each in (x, x / 2, x * x, x * x / 2, x * x / 4)]).reshape(5, 1, 1)
moments = NoiseMoments((0.0,), 4, sums)
print([round(fit(moments, moments, CorrectFit(most_k=most)).report[0].k, 3) for most in (1.0, 0.25)])
"""


def test_a_recipe_key(answers: dict[str, list[str]]) -> None:
    assert are_places(list(KEY), places("How to add a recipe key"))
    assert answers["key"] == [
        "True",
        "[0.25]",
        "False",
        "Greatest size of k.",
        "passes.correct.most_k: got 2, wanted at most 1.0",
        "[0.5, 0.25]",
    ]


KIND: dict[str, Change] = {
    "quant_spec/tasks/shake.py": '''"""Shake: a state as it is, or not."""

from __future__ import annotations

from dataclasses import dataclass

from quant_spec.passes.shake import Shake
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

STATE = "state"


class Params(Shake, TaskParams):
    """How much."""


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """A unit's state."""

    state: Source


KIND = TaskKind("shake", 1, "workers.tasks.shake:run", Params, Inputs, (STATE,))
''',
    "quant_spec/kinds.py": (
        insertion("    step_bits,\n    step_effects,\n", "    shake,\n"),
        insertion("    noop,  # neither", "    shake,\n"),
    ),
    "workers/tasks/shake.py": '''"""Shake: move the steps of a state's grids."""

from __future__ import annotations

from quant_core.fit.unit_state import UnitState
from quant_core.methods.shake.grids import shaken
from quant_spec.tasks.shake import STATE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Shake one unit."""
    state = shaken(UnitState.from_bytes(context.store.get_bytes(inputs.state)), params)
    return TaskOutput({STATE: context.store.put_bytes(state.to_bytes())})
''',
    "orchestrator/planning/passes/shake.py": '''"""Shake: every unit after it is rounded."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import SMALL
from orchestrator.planning.draft import Draft, Drawing
from quant_spec.tasks.shake import KIND, STATE, Inputs, Params


def shake(draft: Draft) -> Drawing:
    """Leave the shaken state of each unit."""
    config = draft.recipe.passes.shake
    if config is None:
        return draft
    states = dict(draft.states)
    for name, state in draft.states.items():
        node = draft.node(KIND, Params.of(config), Inputs(state), SMALL, name)
        states[name] = TaskRef(node.id, STATE)
        yield node
    return replace(draft, states=states)
''',
    "quant_spec/passes/table.py": (insertion('    "correct": (', '    "shake": ("shake",),\n'),),
}
METHOD: dict[str, Change] = {
    "quant_spec/passes/shake.py": '''"""Shake: move the steps of all grids."""

from __future__ import annotations

from pydantic import Field

from quant_spec.record import Positive, Record


class Shake(Record):
    """Move the steps of all grids."""

    by: Positive = Field(default=1.5, description="What steps are multiplied with.")
''',
    "quant_spec/recipe.py": (
        insertion(
            "    correct: Correct | None = Field(",
            '    shake: Shake | None = Field(default=None, description="A toy.")\n',
        ),
        insertion("from quant_spec.passes.temporal import", "from quant_spec.passes.shake import Shake\n"),
    ),
    "quant_spec/passes/table.py": KIND["quant_spec/passes/table.py"],
    "orchestrator/planning/passes/shake.py": KIND["orchestrator/planning/passes/shake.py"],
    "orchestrator/planning/planner.py": (
        Edit("answer, reconstruct,", "answer, shake, reconstruct,"),
        insertion(
            "from orchestrator.planning.passes.step_bits", "from orchestrator.planning.passes.shake import shake\n"
        ),
    ),
    "quant_core/methods/shake/grids.py": '''"""A toy."""

from __future__ import annotations

from dataclasses import replace

from quant_core.fit.unit_state import UnitState
from quant_spec.passes.shake import Shake


def shaken(state: UnitState, config: Shake) -> UnitState:
    """Return a state whose weights' steps are multiplied."""
    scales = {name: tensor * config.by for name, tensor in state.tensors.items() if name.endswith(".scale")}
    return replace(state, tensors={**state.tensors, **scales})
''',
}


METHOD_IS_THERE = """
import torch
from orchestrator.recipes.load import load_recipe
from quant_core.fit.unit_state import UnitState
from quant_spec.formats import UnitFormat
from quant_spec.passes.table import kinds_of
from workers.execution.execute import TaskCall, execute_call
from workers.storage.store import open_store

print("shake" in kinds_of(load_recipe("base").recipe.model_dump(mode="json")))
nodes = planned("passes.shake={by: 2}")
shakes = [node for node in nodes if node.kind == "shake"]
print(len(shakes) == sum(len(node.params["units"]) for node in nodes if node.kind == "round"), shakes[0].params)
print({item.task for node in nodes if node.kind == "pack" for item in node.inputs["states"]} == {n.id for n in shakes})
print("shake" in kinds_of(load_recipe("base", ["passes.shake={}"]).recipe.model_dump(mode="json")))
try:
    load_recipe("base", ["passes.shake={byy: 2}"])
except Exception as error:
    print(error)
Path("store").mkdir()
store = open_store("store")
state = UnitState(UnitFormat("unit", {}, {}), (), {"layer.scale": torch.ones(2), "layer.qweight": torch.ones(2)})
call = TaskCall("shake", {"by": 2.0}, {"state": [store.put_bytes(state.to_bytes())]}, "store", "cache", version=1)
after = UnitState.from_bytes(store.get_bytes(execute_call(call).outputs["state"]))
print(sorted((name, tensor.tolist()) for name, tensor in after.tensors.items()))
"""


def test_a_method_and_its_kind(answers: dict[str, list[str]]) -> None:
    assert are_places(list(KIND), places("How to add a task kind"))
    assert are_places(list(METHOD), places("How to add a method"))
    assert answers["method"] == [
        "False",
        "True {'by': 2.0}",
        "True",
        "True",
        "passes.shake.byy: unknown key; nearest: by",
        "[('layer.qweight', [1.0, 1.0]), ('layer.scale', [2.0, 2.0])]",
    ]


METRIC: dict[str, Change] = {
    "quant_spec/metrics.py": (
        insertion(
            '    "fd": Metric(',
            """    "worst_db": Metric(
        "Peak signal-to-noise ratio of the worst sample",
        unit="dB",
        direction=Direction.HIGHER,
        format=".2f",
        is_required=True,
        is_number=True,
        places={Place.CARD: Shown("worst sample, dB", lambda values: (f"{values['worst_db']:.1f}", "-"), 9)},
    ),
""",
        ),
    ),
    "quant_core/metrics/worst.py": '''"""The worst sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file


def worst_db(evaluations: Sequence[Path]) -> float:
    """Return the least PSNR of all samples, dB."""
    return min(float(load_file(path)["psnr_db"].min()) for path in evaluations)
''',
    "workers/tasks/score.py": (
        insertion(
            "    check_computed(metrics)\n", '    metrics["worst_db"] = worst_db(local_files(evaluations, context))\n'
        ),
        insertion("from quant_spec.enums import", "from quant_core.metrics.worst import worst_db\n"),
    ),
}


METRIC_IS_THERE = """
from quant_core.artifact.card import check_metrics
from quant_spec.metrics import Place, lines
from workers.execution.execute import TaskCall, execute_call

metrics = execute_call(TaskCall(**json.loads(os.environ["SCORE"]))).metrics["metrics"]
print(0 < metrics["worst_db"] <= metrics["psnr_db"])
check_metrics(metrics)
print(any("worst sample, dB" in text for row in lines(Place.CARD, metrics).items() for text in map(str, row)))
"""


def test_a_metric(answers: dict[str, list[str]]) -> None:
    assert are_places(list(METRIC), places("How to add a metric"))
    assert answers["metric"] == ["True", "True"]


class Noting(InProcess):
    """Keeps the call that scores."""

    score: TaskCall | None = None

    def answer(self, call: TaskCall) -> dict[str, Any]:
        """Run a call."""
        if call.kind == "score":
            Noting.score = call
        return super().answer(call)


@pytest.fixture(scope="module")
def score_call(tmp_path_factory: pytest.TempPathFactory) -> TaskCall:
    """What scores a job that has run."""
    folder = tmp_path_factory.mktemp("scored")
    settings = {"sampler.num_inference_steps": 2, "calibration.seeds": 2, "evaluation.seeds": 4, "evaluation.grid": 2}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: Noting())
        model = str(write_model(folder / "little", 0))
        assert run_cli(["--home", str(folder / "home"), "run", "minmax-w8a8", "--model", model, *words]) == 0
    assert Noting.score is not None
    return Noting.score


@pytest.fixture(scope="module")
def answers(score_call: TaskCall, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the code of each toy prints, in a copy of all packages, compiled as far as they are, with all toys in it."""
    copy = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        # What another process is writing has a number behind its name, and may be gone.
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("*.pyc.*"))
    for changes in (KEY, {**METHOD, **KIND}, METRIC):
        write(copy, changes)
    codes = {"key": KEY_IS_THERE, "method": METHOD_IS_THERE, "metric": METRIC_IS_THERE}
    code = PRELUDE + "".join(f'print("## {name}")\n{own}' for name, own in codes.items())
    told = {"PYTHONPATH": str(copy), "RECORDED": str(RECORDED), "SCORE": json.dumps(score_call.to_json())}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=os.environ | told, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^## (\w+)\n", done.stdout, flags=re.MULTILINE)[1:]
    return {name: printed.splitlines() for name, printed in zip(parts[::2], parts[1::2], strict=True)}
