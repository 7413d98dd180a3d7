"""Watching the number of function evaluations, the usual way for a CNF to become slow."""

from __future__ import annotations

import statistics
from typing import Any

GROWTH = 10
FIRST = 20  # steps that say what is usual for this run
RECENT = 20


class NfeWatch:
    """Notices, once in a run, that forward NFE have grown tenfold."""

    def __init__(self) -> None:
        self._first: list[int] = []
        self._recent: list[int] = []
        self._told = False

    def add(self, nfe: int) -> str | None:
        """Takes the NFE of a step; returns a warning the one time that it is due."""
        if len(self._first) < FIRST:
            self._first.append(nfe)
            return None
        self._recent = [*self._recent[-RECENT + 1 :], nfe]
        usual, now = statistics.median(self._first), statistics.median(self._recent)
        if self._told or len(self._recent) < RECENT or now < GROWTH * usual:
            return None
        self._told = True
        return (
            f"A solve now takes {now:.0f} function evaluations where it took {usual:.0f} at the "
            "beginning: the flow is becoming stiff. A lower --lr, more --weight-decay or looser "
            "--rtol and --atol help."
        )

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"first": self._first, "recent": self._recent, "told": self._told}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undoes ``state``."""
        self._first, self._recent = list(state["first"]), list(state["recent"])
        self._told = state["told"]
