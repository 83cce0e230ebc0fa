"""Some of the base parameters, by a regular expression on their names."""

from __future__ import annotations

import re

from metaxl_evo.bilevel.tree import Tree


def require_pattern(owner: str, pattern: str | None) -> None:
    """Refuse what is no regular expression.

    Raises:
        ValueError: saying why; None is left out.
    """
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"{owner}: parameters={pattern!r} is not a regular expression: {error}") from None


def found_by(owner: str, pattern: str | None, w: Tree) -> tuple[str, ...]:
    """The names of `w` that a pattern finds, in their order; all of them where it is None.

    Raises:
        ValueError: where it finds none.
    """
    names = tuple(name for name in w if pattern is None or re.search(pattern, name))
    if not names and pattern is not None:
        examples = ", ".join(list(w)[:2] + list(w)[-2:])
        raise ValueError(f"{owner}: parameters={pattern!r} finds none of the base parameters, such as {examples}")
    return names
