"""One-line error messages that name the valid choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, given: str, valid: Iterable[str]) -> str:
    """`unknown estimator 'evograda': did you mean 'evograd'? Valid: evograd, one_step`."""
    choices = list(valid)
    close = difflib.get_close_matches(given, choices, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {given!r}:{hint} Valid: {', '.join(choices)}"
