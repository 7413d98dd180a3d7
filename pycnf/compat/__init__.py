"""pycnf in the place of torchdiffeq, for code that is not to be changed.

    import pycnf

    pycnf.compat.install()   # before what imports torchdiffeq

or, without a change to a script,

    python -m pycnf.compat script.py [args]
    python -m pycnf.compat -m module [args]

From then on `import torchdiffeq` and the imports of its inner modules give pycnf in this process
and those forked from it. A worker that multiprocessing *spawns* has to call `install` itself.
"""

from __future__ import annotations

import importlib
import sys

__all__ = ["install"]


def install() -> None:
    """Makes `import torchdiffeq` give pycnf, whether torchdiffeq is installed or imported or not.

    Says so once, on stderr. Names that a module took from torchdiffeq before stay torchdiffeq's.

    Example:
        >>> import pycnf
        >>> pycnf.compat.install()
        >>> from torchdiffeq import odeint
        >>> odeint is pycnf.odeint
        True
    """
    modules = importlib.import_module("pycnf.compat.modules")
    before = sys.modules.get("torchdiffeq")
    if before is modules.STAND_INS["torchdiffeq"]:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchdiffeq"]:
        del sys.modules[name]
    sys.modules.update(modules.STAND_INS)
    if modules.Missing not in sys.meta_path:
        sys.meta_path.insert(0, modules.Missing)
    note = "" if before is None else "; what was imported from torchdiffeq before stays as it was"
    print(f"pycnf.compat: `import torchdiffeq` now gives pycnf{note}", file=sys.stderr)
