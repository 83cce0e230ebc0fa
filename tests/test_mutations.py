"""The list of mutations is alive: each is of a text that is there, and names tests that are. `make mutate` runs it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.mutations import MUTATIONS, place_of

REPOSITORY = Path(__file__).resolve().parents[1]
LEAST = 100
ROOMS = [*REPOSITORY.glob("metaxl_evo/*/__init__.py"), REPOSITORY / "vision_tasks/__init__.py"]


def test_every_mutation_changes_a_text_that_stands_once() -> None:
    assert len(MUTATIONS) >= LEAST
    for mutation in MUTATIONS:
        place_of(mutation, REPOSITORY)
        assert mutation.new != mutation.old
    assert max(Counter(mutation.name for mutation in MUTATIONS).values()) == 1


def test_every_room_has_some() -> None:
    rooms = {str(room.parent.relative_to(REPOSITORY)) for room in ROOMS}
    assert len(rooms) >= 7
    assert rooms <= {mutation.room for mutation in MUTATIONS}


def test_the_tests_that_they_name_are_there() -> None:
    for mutation in MUTATIONS:
        assert mutation.tests, mutation.name
        for test in mutation.tests:
            file, _, function = test.partition("::")
            text = (REPOSITORY / "tests" / file).read_text(encoding="utf-8")
            name = function.partition("[")[0]
            assert f"def {name}(" in text or not name, f"{mutation.name}: {test}"
