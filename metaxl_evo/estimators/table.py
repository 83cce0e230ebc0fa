"""What the estimators say of themselves, as Markdown; docs/estimators.md holds it between marks.

python -m metaxl_evo.estimators.table docs/estimators.md    # writes it into the page anew (make docs)
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from metaxl_evo.bilevel import Counts
from metaxl_evo.estimators import ESTIMATORS, Estimator, make_estimator
from metaxl_evo.estimators.local import Engine, EngineEstimator
from metaxl_evo.estimators.work import work

Row = tuple[str, Estimator]
Columns = Mapping[str, Callable[[Estimator], str]]

EPISODE = 10  # steps
ALSO: dict[str, dict[str, Any]] = {  # settings under which an estimator's facts are others than by default
    "unroll": {"horizon": 3},
    "forward_mode": {"windows": 3},
    "hyperdistill": {"scale": "fixed"},
}
MARKED = re.compile(r"(<!-- estimators: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(page: str) -> str:
    """The text of a page with what stands between `<!-- estimators: BLOCK -->` and `<!-- end -->` made anew."""
    return MARKED.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[3], page)


def summary() -> str:
    """Each estimator in one line, that of its module."""
    return _table(_defaults(), {"what it is": lambda e: _first_line(inspect.getmodule(e)), "exact": lambda e: e.exact})


def facts() -> str:
    """What each promises, and what it asks for."""
    columns: Columns = {
        "exact": lambda e: e.exact,
        "answers": lambda e: "at any step" if e.online else "at an episode's end",
        "at the weights": lambda e: "before the step" if e.evaluated_at == "previous" else "after it",
        "remembers": lambda e: REMEMBERED[e.remembers],
        "second derivatives": _second_derivatives,
        "inner optimiser": _optimizer,
        "lam may be its numbers": lambda e: "yes" if e.tunes_optimizer else "no",
        "lam": _lam,
    }
    return _table(_with_variants(), columns)


def costs() -> str:
    """The passes of one hypergradient of a step that was made, and the fields that they depend on."""
    columns: Columns = {
        "one step": lambda e: _passes(work(e, 1).passes),
        "sent": lambda e: _sent(work(e, 1).sent),
        f"an episode of {EPISODE}": lambda e: _passes(work(e, EPISODE).passes),
        "fields": lambda e: _settings(asdict(e)) or "none",
    }
    return _table(_with_variants(), columns)


def formulas() -> str:
    """The first line of each class, which is its formula, and the source."""
    return "".join(f"- `{name}`: `{_first_line(e).rstrip('.')}`. {e.citation}.\n" for name, e in _defaults())


BLOCKS = {"summary": summary, "facts": facts, "costs": costs, "formulas": formulas}
REMEMBERED = {
    "nothing": "nothing",
    "meta": "a tree like lam",
    "base": "trees like w",
    "trajectory": "the episode's steps",
}


def _defaults() -> list[Row]:
    return [(name, make_estimator(name)) for name in ESTIMATORS]


def _with_variants() -> list[Row]:
    rows = []
    for name, estimator in _defaults():
        rows.append((name, estimator))
        if name in ALSO:
            rows.append((f"{name}, {_settings(ALSO[name])}", make_estimator(name, **ALSO[name])))
    return rows


def _table(rows: Iterable[Row], columns: Columns) -> str:
    lines = [["estimator", *columns], ["---"] * (1 + len(columns))]
    lines += [[f"`{label}`", *(column(estimator) for column in columns.values())] for label, estimator in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _second_derivatives(estimator: Estimator) -> str:
    if not isinstance(estimator, EngineEstimator):
        return "yes" if estimator.second_order else "none"
    engines = [engine for engine in get_args(Engine) if engine != "auto"]  # which settles for one of the others
    once = [f"`{engine}`" for engine in engines if not replace(estimator, engine=engine).second_order]
    return f"none with {', '.join(once)}" if once else "yes"


def _optimizer(estimator: Estimator) -> str:
    if estimator.needs_sgd:
        return "SGD"
    return "SGD, Adam, AdamW" if estimator.needs_update_rule else "any"


def _lam(estimator: Estimator) -> str:
    if estimator.max_meta_size is not None:
        return f"at most {estimator.max_meta_size} numbers"
    return "read by the outer loss" if estimator.requires_direct_term else "any"


def _passes(counts: Counts) -> str:
    letters = {"forwards": "F", "backwards": "B", "hvps": "D", "jvps": "J", "suffixes": "S"}
    made = counts.as_dict()
    return " + ".join(f"{made[name]} {letter}" for name, letter in letters.items() if made[name])


def _sent(sent: Counter[str]) -> str:
    return " + ".join(f"{sent[what]} {what}".strip() for what in ("w", "lam", "") if sent[what])


def _settings(fields: Mapping[str, Any]) -> str:
    """As in YAML: `horizon: null, decay: 0.9, scale: fit`."""
    return ", ".join(f"{name}: {json.dumps(value)}" for name, value in fields.items()).replace('"', "")


def main(files: Sequence[str]) -> None:
    """Write the marked parts of the pages anew."""
    for file in map(Path, files):
        file.write_text(updated(file.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
