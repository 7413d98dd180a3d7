"""The error that means: what the user gave cannot be used, and the program is not at fault."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user. Its text is one complete sentence that names the remedy."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ``" (did you mean A or B?)"`` for the known words nearest to ``word``, or ``""``."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=2, cutoff=0.5)
    if not close:
        return ""
    return f" (did you mean {' or '.join(by_lower[c] for c in close)}?)"
