"""Ctrl-C as a polite request: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """Context in which Ctrl-C and SIGTERM set ``signal`` instead of breaking in anywhere.

    A second Ctrl-C breaks in at once; what was saved last then stands.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread alone and forbids handlers elsewhere.
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
