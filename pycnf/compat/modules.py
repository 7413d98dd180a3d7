"""The stand-in's modules under torchdiffeq's names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from pycnf.compat import torchdiffeq
from pycnf.compat.changes import StandIn, watch

_HOME = "pycnf.compat."
# Where solvers look their parts up.
_WATCHED = ("event_handling", "fixed_grid", "interp", "misc", "rk_common", "solvers")

STAND_INS: dict[str, ModuleType] = {
    name.removeprefix(_HOME): module
    for name, module in sys.modules.items()
    if (name + ".").startswith(torchdiffeq.__name__ + ".")
}
for _module in STAND_INS.values():
    _module.__class__ = StandIn
for _name in _WATCHED:
    watch(STAND_INS[f"torchdiffeq._impl.{_name}"])


class Missing:
    """Says which modules there are, in the place of a bare ModuleNotFoundError."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        """Raises for a submodule of torchdiffeq that the stand-in has not."""
        if name.startswith("torchdiffeq.") and sys.modules.get("torchdiffeq") is torchdiffeq:
            raise ModuleNotFoundError(
                f"pycnf stands in for torchdiffeq, and has no module {name!r}; "
                f"it has {', '.join(sorted(STAND_INS))}",
                name=name,
            )
