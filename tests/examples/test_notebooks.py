"""Every notebook of examples/ runs from its first cell to its last, on the tiny model."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from runners import api
from runners.api import fit, read_texts
from runners.base_model.synthetic import tiny_model
from tests.conftest import ROOT
from tests.runners.test_api import BUDGET

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A clone's folder `examples`, with a saved routed model beside it."""
    model, tokenizer = tiny_model(seed=3)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    model.config.name_or_path = str(tmp_path / "base")
    made = fit(model, tokenizer, "greedy", read_texts("test")[:8], sparsity=0.4, budget=BUDGET)
    made.save(tmp_path / "results" / "1" / "routed")
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, place, monkeypatch):
    """As it stands, but for the model's name, a budget, and the number of texts that are read."""
    book = json.loads(path.read_text())
    assert not any(cell.get("outputs") for cell in book["cells"]), "outputs are not committed"
    whole = api._group
    small = lambda group, *of: BUDGET if group == "budget" else whole(group, *of)  # noqa: E731
    monkeypatch.setattr(api, "_group", small)
    monkeypatch.setattr(api, "read_texts", lambda split: [t[:2000] for t in read_texts(split)[:8]])
    module = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace('"smollm2_135m"', '"tiny"')
            exec(compile(code, path.name, "exec"), module.__dict__)


def test_there_is_one_for_each_task():
    assert {path.stem for path in NOTEBOOKS} == {"saved_model", "own_model", "compare"}
