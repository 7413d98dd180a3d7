"""``python -m pycnf.compat script.py [args]``: runs a script that imports torchdiffeq on pycnf."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys

from pycnf.compat import install

USAGE = """usage: python -m pycnf.compat script.py [args]
       python -m pycnf.compat -m module [args]

Runs a script or a module with pycnf in the place of torchdiffeq."""


def main(arguments: list[str]) -> None:
    """Runs a script or a module as Python would."""
    as_module = arguments[:1] == ["-m"]
    arguments = arguments[as_module:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not arguments:
        raise SystemExit(USAGE)
    target = arguments[0]
    if not as_module and not os.path.exists(target):
        raise SystemExit(f"pycnf.compat: no such script: {target}")
    if as_module and importlib.util.find_spec(target) is None:
        raise SystemExit(f"pycnf.compat: no such module: {target}")
    install()
    sys.argv = arguments
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    if not getattr(sys.flags, "safe_path", False):
        # A folder or an archive with a __main__.py is put there by runpy itself.
        sys.path[:1] = [os.path.dirname(os.path.realpath(target))] if is_source(target) else []
    runpy.run_path(target, run_name="__main__")


def is_source(path: str) -> bool:
    """Whether a path is a script, not a folder or an archive."""
    return os.path.isfile(path) and not path.endswith((".zip", ".pyz"))


if __name__ == "__main__":
    main(sys.argv[1:])
