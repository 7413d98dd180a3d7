"""What a person sees while a run trains: one live line on a terminal, a short log elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

BAR = 16
REDRAW_SECONDS = 0.1
LOG_LINES = 20  # at most, where stdout is no terminal


class Progress:
    """Reports a run's progress to stdout.

    On a terminal one line is redrawn in place. Elsewhere (a file, a pipe) a line is printed per
    validation, ``LOG_LINES`` of them at most. ``quiet`` prints nothing.
    """

    def __init__(self, total: int, quiet: bool = False, stream: TextIO | None = None):
        """Starts reporting.

        Args:
            total: steps of the whole run.
            quiet: print nothing.
            stream: stdout by default.
        """
        self.total = total
        self.quiet = quiet
        self.stream = stream or sys.stdout
        self.live = not quiet and self.stream.isatty()
        self._drawn = 0.0
        self._shown = False
        self._rate: float | None = None
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self._log_every = max(1, total // LOG_LINES)
        self._next_log = 0

    def step(
        self,
        step: int,
        loss: float,
        validation: float | None,
        nfe_forward: float,
        nfe_backward: float,
    ) -> None:
        """Tells of a step just taken; redraws the live line ten times a second."""
        now = time.monotonic()
        if self._last is not None and now > self._last[1]:
            rate = (step - self._last[0]) / (now - self._last[1])
            self._rate = rate if self._rate is None else 0.95 * self._rate + 0.05 * rate
        self._last = (step, now)
        self._first = self._first or self._last
        if self.live and now - self._drawn >= REDRAW_SECONDS:
            self._drawn = now
            text = self._text(step, loss, validation, nfe_forward, nfe_backward)
            width = shutil.get_terminal_size().columns - 1
            bar = self._bar(step)
            self._draw(bar + text if len(bar + text) <= width else text[:width])

    def validation(
        self, step: int, loss: float, validation: float, nfe_forward: float, nfe_backward: float
    ) -> None:
        """Tells of a validation; a line of the log where stdout is no terminal."""
        if self.live or self.quiet or (step < self._next_log and step < self.total):
            return
        self._next_log = step + self._log_every
        self._print(self._text(step, loss, validation, nfe_forward, nfe_backward))

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        if not self.quiet:
            self.clear()
            self._print(line)

    def clear(self) -> None:
        """Takes the live line away."""
        if self._shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self._shown = False

    def pause(self) -> None:
        """Keeps time spent on something else (a validation) out of steps/s."""
        self._last = None

    def _print(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()

    def _draw(self, line: str) -> None:
        self.stream.write("\r\x1b[K" + line)
        self.stream.flush()
        self._shown = True

    def _bar(self, step: int) -> str:
        full = BAR * step // max(1, self.total)
        return "━" * full + "╌" * (BAR - full) + " "

    def _text(
        self, step: int, loss: float, validation: float | None, forward: float, backward: float
    ) -> str:
        parts = [f"{step:>{len(str(self.total))}}/{self.total}", f"loss {loss:.3f}"]
        if validation is not None:
            parts.append(f"val {validation:.3f}")
        parts.append(f"NFE {forward:.0f}/{backward:.0f}")
        if self._rate:
            parts.append(f"{self._rate:.1f} steps/s")
        if self._first and self._last and self._last[0] > self._first[0]:
            # Over the whole run so far, so that the validations to come are counted in.
            pace = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
            parts.append(f"{_clock((self.total - step) * pace)} left")
        return " · ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
