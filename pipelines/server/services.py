"""Several processes that run as one: they start together, and none outlives the others."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

GRACE = 5.0  # seconds in which a process may end by itself before it is killed
LOOK = 0.5  # seconds between two looks at whether a process has ended


@dataclass(frozen=True)
class Service:
    """A process to start.

    Args:
        command: what to run.
        graceful: whether it is asked to end by itself (SIGINT) before it is killed. Runs in progress are killed: a run
            that is interrupted counts as failed, one whose process is gone is resumed from its checkpoint.
        ready: a file that appears when the next service may start.
    """

    name: str
    command: Sequence[str]
    graceful: bool = True
    ready: Path | None = None


class Stopped(Exception):
    """A signal asked to end."""


def run(services: Iterable[Service], environment: Mapping[str, str]) -> int:
    """Run services until SIGINT or SIGTERM, or until one of them ends; then end all, with every process they started.

    Both signals work however this process was started: a shell starts background jobs with SIGINT ignored, and
    children inherit that unless it is handled here.

    Returns:
        0 after a signal, 1 after a service has ended by itself.
    """
    wake, written = os.pipe()
    os.set_blocking(written, False)
    before = {number: signal.signal(number, _noted) for number in (signal.SIGINT, signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(written)
    started: list[tuple[Service, subprocess.Popen[bytes]]] = []
    try:
        for service in services:
            process = subprocess.Popen(service.command, env=dict(environment), start_new_session=True)
            started.append((service, process))
            while service.ready and not service.ready.exists():
                _look(started, wake)
        while True:
            _look(started, wake)
    except Stopped:
        return 0
    except _Ended as ended:
        print(f"personalize: {ended}", flush=True)
        return 1
    finally:
        end(started)
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake)
        os.close(written)


class _Ended(Exception):
    """A service ended by itself."""


def _noted(number: int, frame: object) -> None:
    """The number is in the pipe by now, where `_look` waits for it."""


def _look(started: Iterable[tuple[Service, subprocess.Popen[bytes]]], wake: int) -> None:
    """Wait a moment; raises Stopped after a signal, and _Ended where a service is gone."""
    for service, process in started:
        if (code := process.poll()) is not None:
            raise _Ended(f"the {service.name} ended with exit code {code}, so everything else is ended too")
    if select.select([wake], [], [], LOOK)[0]:
        raise Stopped


def end(started: Sequence[tuple[Service, subprocess.Popen[bytes]]]) -> None:
    """End processes and all that they started; returns when none of them is left."""
    family = {child for _, process in started for child in _family(process.pid)}
    graceful = [process for service, process in started if service.graceful]
    for process in graceful:
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + GRACE
    while any(process.poll() is None for process in graceful) and time.monotonic() < until:
        time.sleep(0.05)
    family |= {child for _, process in started for child in _family(process.pid)}
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    for _, process in started:
        process.wait()
    while any(map(_lives, family)):
        time.sleep(0.05)


def _family(pid: int) -> set[psutil.Process]:
    """The process and all that it started: its descendants, and those of its session, who outlive a killed parent."""
    found = {process for process in psutil.process_iter() if _session_of(process) == pid}
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        found |= {process, *process.children(recursive=True)}
    return found


def _session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:  # it has ended
        return None


def _lives(process: psutil.Process) -> bool:
    """A zombie is gone: whoever adopted it has only not asked for its exit code yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
