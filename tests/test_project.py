"""What the repository says of itself: links lead somewhere, hooks and CI call what `make` calls, types are shipped."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from quant_spec.kinds import KINDS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
FENCES = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """Return where a page's links lead, without what lies outside and within the page itself."""
    text = FENCES.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[0] for target in targets if not target.startswith(("#", "http", "mailto:"))]


def prerequisites(target: str) -> list[str]:
    """Return what a target of the Makefile is made of."""
    found = re.search(rf"^{target}:([^=\n]*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].split() if found else []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    gone = [target for target in links(page) if not (page.parent / target).exists()]
    assert not gone, f"{page.relative_to(ROOT)}: got links to {', '.join(gone)}, wanted files"


def test_readme_is_one_screen_before_its_table() -> None:
    before, measured, _ = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Measured\n")
    assert measured
    assert len(before.splitlines()) <= 50


def test_handbook_lists_every_page() -> None:
    # Tags that name Python objects are for mkdocs alone.
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/.-]+\.md", config))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}


def test_handbook_says_of_each_kind_of_task_whether_it_gains_by_a_gpu() -> None:
    lines = (ROOT / "docs/how-to/gpus.md").read_text(encoding="utf-8").splitlines()
    said = {
        kind: line.endswith("| yes |") for line in lines if line.endswith(("| yes |", "| no |"))
        for kind in re.findall(r"`(\w+)`", line)
    }  # fmt: skip
    assert said == {name: kind.gpu for name, kind in KINDS.items()}


def test_make_docs_installs_what_builds_the_handbook(tmp_path: Path) -> None:
    words = ["make", "-n", "docs", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    commands = done.stdout.splitlines()
    installed = [place for place, line in enumerate(commands) if line.endswith('"quantmill[docs]"')]
    assert installed
    assert installed[0] < len(commands) - 1
    assert commands[-1].endswith("/mkdocs build --strict")


def test_hooks_and_ci_call_what_make_calls() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [f"make {target}" for target in prerequisites("check")]
    assert "$(MAKE) --no-print-directory --jobs=2 check tests" in (ROOT / "Makefile").read_text(encoding="utf-8")
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    commands = [step["run"] for job in steps.values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run", "make docs"]
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1] == "make test"


def test_packages_ship_their_types_and_licence() -> None:

    packages = PROJECT["tool"]["importlinter"]["root_packages"]
    assert [name for name in packages if not (ROOT / name / "py.typed").is_file()] == []
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]
    assert [name for name in PROJECT["project"]["license-files"] if not (ROOT / name).is_file()] == []


def test_import_contracts_name_every_module() -> None:
    """A contract that lists who may not import something holds for new modules too."""
    contracts = {each["name"]: each for each in PROJECT["tool"]["importlinter"]["contracts"]}
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("orchestrator/*")}
    rooms = {name for name in modules if not name.endswith(("__init__", "py.typed", "__pycache__", "orchestrator.py"))}
    listed = set(contracts["SQL only in orchestrator.db and migrations"]["source_modules"])
    assert rooms - listed == {"orchestrator.db"}
    execution = {f"workers.execution.{path.stem}" for path in ROOT.glob("workers/execution/*.py")}
    bound = set(contracts["Ray only where tasks are handed to it"]["source_modules"])
    assert execution - bound == {f"workers.execution.{name}" for name in ("__init__", "nodes", "remote")}
