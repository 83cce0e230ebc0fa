"""The notebooks run as they are, in an empty folder, and come out as they say; they are kept without outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/notebooks"
pytestmark = pytest.mark.timeout(600)  # 20 s each on an idle core


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Runs a notebook, and returns the value (JSON) of an expression in its names."""
    for key, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)

    def run(name: str, expression: str) -> Any:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({expression}))"))
        nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
        # A busy machine gets what is printed in several parts.
        streams = (one for one in notebook.cells[-1].outputs if one.get("name") == "stdout")
        return json.loads("".join(one.text for one in streams))

    return run


def test_the_notebooks_are_there_and_clean() -> None:
    found = {file.stem: nbformat.read(file, as_version=4) for file in sorted(FOLDER.glob("*.ipynb"))}
    assert list(found) == ["compare_estimators", "first_tagger", "read_a_study"]
    for name, notebook in found.items():
        nbformat.validate(notebook)
        assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook)), name


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_a_first_tagger_learns_and_tags(ask: Callable[[str, str], Any]) -> None:
    scores = "[one['test']['beru']['f1'] for one in (plain, meta)]"
    f1, moved, kinds = ask(
        "first_tagger", f"[{scores}, list(history.meta_moved.dropna()), [one['entity_group'] for one in found]]"
    )
    assert min(f1) > 0.1
    assert moved[-1] > moved[0] > 0
    assert set(kinds) <= {"LOC", "ORG", "PER"}
    assert kinds


@pytest.mark.slow
def test_estimators_are_compared_with_the_exact_one(ask: Callable[[str, str], Any]) -> None:
    rows = ask("compare_estimators", "json.loads(table.set_index('estimator').to_json(orient='index'))")
    cosines = {name: row["cosine"] for name, row in rows.items() if row["refused"] is None}
    assert rows.keys() - cosines.keys() == {"first_order"}
    exact = {name for name, cosine in cosines.items() if cosine == pytest.approx(1, abs=1e-9)}
    assert exact == {"unroll", "forward_mode"}
    assert all(rows[name]["size"] == pytest.approx(1, abs=1e-9) for name in exact)
    assert cosines["one_step"] > 0.5


@pytest.mark.slow
def test_a_study_is_read(ask: Callable[[str, str], Any]) -> None:
    """Its difference is that of the accuracies that the files of the runs say."""
    (row,), files = ask(
        "read_a_study",
        "[results['differences'], {str(f.relative_to(folder).parent): json.loads(f.read_text())['test']['accuracy'] "
        "for f in folder.glob('*/*/results.json')}]",
    )
    gains = [files[f"one_step/{seed}"] - files[f"baseline/{seed}"] for seed in range(3)]
    assert row["mean"] == pytest.approx(100 * sum(gains) / 3)
    assert min(gains) > 0.1
