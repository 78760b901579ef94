"""Work in a thread, such as writing files, while the caller goes on."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Self


class Background:
    """Does what it is given in a thread, one thing after the other, in order.

    Whoever gives it the next thing waits until the one before is done, so what waits to be written never grows. What
    a thing raises is raised in the caller: by the next call of this object, or at the end of the `with` block. A block
    that fails is left once the last thing is done, and its own failure is the one that is raised.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        if failure is None:
            self.wait()
        elif self._thread:
            self._thread.join()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def do(self, work: Callable[[], object]) -> None:
        """Returns as soon as it has begun."""
        self.wait()
        self._thread = Thread(target=self._run, args=(work,), name="background")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is left to do."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what the last thing raised, if it has ended and that is not known yet."""
        if not self.busy and self._failure:
            failure, self._failure = self._failure, None
            raise failure

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as failure:
            self._failure = failure
