"""One-line error messages that name the valid choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 500  # characters of a message
SHOWN = 300  # characters of a list of choices


def unknown(what: str, given: str, valid: Iterable[str]) -> str:
    """`unknown estimator 'evograda': did you mean 'evograd'? Valid: evograd, one_step`; of many choices the first."""
    choices = list(valid)
    close = difflib.get_close_matches(given, choices, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {given!r}:{hint} Valid: {_first(choices)}"


def one_line(error: object) -> str:
    """The text of an error, of any library, as one printable line; the middle of a very long one is left out."""
    text = " ".join("".join(char if char.isprintable() else " " for char in str(error)).split())
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def first_line(error: Exception) -> str:
    """The first line of a library's error, or its kind where it says nothing."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def _first(choices: list[str]) -> str:
    shown = choices
    while len(", ".join(shown)) > SHOWN:
        shown = shown[: len(shown) * 3 // 4]
    rest = len(choices) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
