"""SIGTERM and Ctrl-C end a run at a point from which it goes on as if nothing had been.

A signal raises Interrupted at once where that is allowed, else at the next `check`. Nothing but the
handler runs at the moment of the signal.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """The run was asked to stop by `signal`. No Exception: nobody on the way mends it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class Interruption:
    """Handles SIGTERM and SIGINT inside `with`; a second SIGINT is an ordinary KeyboardInterrupt.

    In another thread than the main one, where Python allows no handlers, it does nothing.
    waits: nothing is raised, but for that; whoever runs looks at `asked`.
    """

    def __init__(self, waits: bool = False) -> None:
        self.waits = waits
        self.asked: int | None = None  # a signal, the last of them
        self._allowed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
        if self._allowed:
            self._allowed = False
            raise Interrupted(number)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Inside, until `hold`, a signal raises Interrupted at once, whatever is being done."""
        try:
            self._allowed = not self.waits
            self.check()
            yield
        finally:
            self._allowed = False

    def hold(self) -> None:
        """From here on a signal waits for the next `check`."""
        self._allowed = False
        self.check()

    def check(self) -> None:
        """Raise Interrupted if there was a signal."""
        if self.asked is not None and not self.waits:
            raise Interrupted(self.asked)
