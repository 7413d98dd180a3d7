"""Notices where a script replaces a part of torchdiffeq's solvers, in a class, an instance or a
module.

Compiled steps are taken only where nothing was replaced; otherwise the stand-in's own methods run,
and call whatever now stands in their place.
"""

from __future__ import annotations

import abc
import dis
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_originals: dict[str, dict[str, Any]] = {}
_listeners: list[Callable[[], None]] = []
_replaced: set[tuple[str, str]] = set()


class SolverType(abc.ABCMeta):
    """The type of solver classes; tells of attributes that are set after a class was made."""

    def __setattr__(cls, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        _announce(name)

    def __delattr__(cls, name: str) -> None:
        super().__delattr__(name)
        _announce(name)


class StandIn(ModuleType):
    """A module of the stand-in; says what it has when it is asked for what it has not."""

    def __getattr__(self, name: str) -> Any:
        message = (
            f"pycnf stands in for torchdiffeq, and its {self.__name__} has no {name!r}; "
            f"it has {', '.join(vars(self).get('__all__', []))}"
        )
        caller = sys._getframe(1)
        if caller.f_code.co_code[caller.f_lasti] == dis.opmap["IMPORT_FROM"]:
            # Python makes a text of its own for "from module import name" of an AttributeError.
            raise ImportError(message, name=self.__name__, path=self.__file__)
        raise AttributeError(message, name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self._compare(name)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._compare(name)

    def _compare(self, name: str) -> None:
        originals = _originals.get(self.__name__, {})
        if name in originals:
            same = vars(self).get(name) is originals[name]
            (_replaced.discard if same else _replaced.add)((self.__name__, name))
            _announce(name)


def watch(module: ModuleType) -> None:
    """Takes note of what replaces the module's functions and classes from now on."""
    _originals[module.__name__] = {
        name: value for name, value in vars(module).items() if not name.startswith("__")
    }


def on_change(listener: Callable[[], None]) -> None:
    """Calls the listener whenever an attribute of a solver class or a watched module is set."""
    _listeners.append(listener)


def _announce(name: str) -> None:
    if not name.startswith(("__abstract", "_abc_")):
        for listener in _listeners:
            listener()


def parts(cls: type, *names: str) -> dict[str, Any]:
    """The attributes of a class as they are now; by default all but special methods."""
    names = names or (*(name for name in dir(cls) if not name.startswith("__")), "__init__")
    return {name: inspect.getattr_static(cls, name) for name in names}


def is_unchanged(cls: type, originals: dict[str, Any], instance: Any = None) -> bool:
    """Whether a class still has these attributes, its instance none over them, and no watched
    function was replaced.
    """
    if _replaced or (instance is not None and not originals.keys().isdisjoint(vars(instance))):
        return False
    return all(
        inspect.getattr_static(cls, name, None) is value for name, value in originals.items()
    )
