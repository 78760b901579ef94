"""Work shared out among processes of this machine, and heard of in this one."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from personalize_core.steps.events import Event, Listener
from personalize_core.workspace.store import OWN_DEVICE

Result = TypeVar("Result")
Task = Callable[[Listener], Result]

LOOK = 0.1  # seconds between two looks at what is going on
_events: Any = None  # in a process that works: where its events go


def shared_out(tasks: Sequence[Task[Result]], processes: int, listener: Listener) -> Iterator[Callable[[], Result]]:
    """Tasks in their order, each when it has ended; called, it gives what it returned, or raises what it raised.

    Whoever stops in between lets those end that are under way, and the rest never begins.

    Args:
        tasks: each takes a listener. For more than one process they can be pickled: a `partial` of a function.
        processes: of 1, this one does everything, each task when it is its turn. Otherwise each process has a core.

    Raises:
        ChildProcessError: something ended one of the processes.
    """
    if processes <= 1:
        for task in tasks:
            yield partial(task, listener)
        return
    context = get_context("spawn")  # a fork would inherit threads of torch and Arrow, and locks that nobody opens
    events = context.Queue()
    with ProcessPoolExecutor(min(processes, len(tasks)), context, _begin, (events,)) as pool:
        futures = [pool.submit(_run, task) for task in tasks]
        try:
            for future in futures:
                while not future.done():
                    _pass_on(events, listener)
                _pass_on(events, listener)
                yield partial(_result, future)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while any(not future.done() for future in futures):
                _pass_on(events, listener)


def in_turn(steps: Sequence[Callable[..., Result]], *arguments: Any) -> list[Result]:
    """Several steps with the same arguments, as one task."""
    return [step(*arguments) for step in steps]


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "one of the processes that share the work was ended from outside; often that is the system, where memory "
            "does not suffice, and then --processes 1 needs least"
        ) from None


def _pass_on(events: Any, listener: Listener) -> None:
    """Everything that was said, and what is said in the next moment."""
    try:
        listener(events.get(timeout=LOOK))
        while True:
            listener(events.get_nowait())
    except queue.Empty:
        pass


def _begin(events: Any) -> None:
    """In a process that is to work."""
    global _events
    _events = events
    os.environ[OWN_DEVICE] = "1"  # a core, here
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed tells nobody, and a process of its pool would wait for more work for ever."""
    parent = parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _run(task: Task[Result]) -> Result:
    def say(event: Event) -> None:
        _events.put(event)

    return task(say)
