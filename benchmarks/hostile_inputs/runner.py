"""Run one input in a process of its own, and tell what became of it.

The process is forked from one that has imported all libraries and computed nothing, and has a process group of its own,
which is killed when the input takes too long or too much memory. What it was given is hashed before and after.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from personalize_core.concepts import image_check
from personalize_core.errors import InputError

ACCEPTED, REFUSED = "accepted rightly", "refused with a sentence"
TRACEBACK, WRONG, HANG, MEMORY = "traceback", "silently wrong", "hang", "memory"
CRASH, CHANGED, LEFTOVERS = (
    "crash of the interpreter",
    "an original changed or deleted",
    "half-written leftovers",
)
CLASSES = (ACCEPTED, REFUSED, TRACEBACK, WRONG, HANG, MEMORY, CRASH, CHANGED, LEFTOVERS)
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; see getrusage(2)

Right = Literal["accepted", "refused", "either"]


def anything(value: Any) -> bool:
    """Whatever an input was read as is right."""
    return True


@dataclass(frozen=True)
class Case:
    """One input, the function of the product that reads it, and what is right."""

    name: str
    give: Callable[[Path], Any]  # puts the input into an empty folder
    read: Callable[[Path], Any]  # calls the product with it
    right: Right = "refused"
    holds: Callable[[Any], bool] = anything  # of what `read` returns, where it may be accepted
    named: Sequence[str] = ()  # a refusal names one of them: the file or the key
    originals: Sequence[str] = ("input",)  # must stay as they are; paths in the folder
    made: Sequence[str] = ()  # must not exist, or be empty, after a refusal; paths in the folder


@dataclass(frozen=True)
class Limits:
    seconds: float
    memory: int  # bytes
    idle: int = 0  # bytes that a fork has which does nothing


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    name: str
    found: str  # one of CLASSES
    what: str  # the refusal, the exception, the value
    seconds: float
    memory: int  # bytes, the most at once, beyond what the process began with


def forked(do: Callable[[], None]) -> int:
    """Start it in a process group of its own. Returns the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    os.setsid()
    status = 1
    try:
        do()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def finish(do: Callable[[], None]) -> None:
    """Do it in a fork, so that this process computes nothing, and wait for it."""
    if status := os.waitstatus_to_exitcode(os.waitpid(forked(do), 0)[1]):
        sys.exit(f"what the inputs are made from could not be prepared: status {status}")


def idle_memory() -> int:
    """The bytes of a fork that does nothing."""
    return os.wait4(forked(lambda: None), 0)[2].ru_maxrss * MAXRSS_UNIT


def run(case: Case, folder: Path, limits: Limits) -> Outcome:
    """Give the input to the product in a process of its own; the folder must not exist, and is removed afterwards."""
    (folder / "temporary").mkdir(parents=True)
    case.give(folder)
    before = [_state(folder / name) for name in case.originals]
    answer = folder / "answer.json"
    started = time.monotonic()
    process = forked(lambda: _answer(case, folder, answer))
    status, usage, seen, stopped = _waited(process, started, limits)
    seconds = time.monotonic() - started
    with suppress(ProcessLookupError, PermissionError):  # what it has started ends with it
        os.killpg(process, signal.SIGKILL)
    told = json.loads(answer.read_text()) if answer.exists() else {}
    memory = max(0, usage.ru_maxrss * MAXRSS_UNIT - limits.idle, seen, told.get("started", 0))
    if stopped == HANG:
        found, what = HANG, f"it had not ended after {limits.seconds:g} s"
    elif stopped == MEMORY or memory > limits.memory:
        found, what = MEMORY, f"it took {memory / 1e9:.1f} GB"
    elif not told:
        found, what = CRASH, f"it ended with status {os.waitstatus_to_exitcode(status)}"
    elif [_state(folder / name) for name in case.originals] != before:
        found, what = CHANGED, f"{' or '.join(case.originals)}; {told['how']}: {told['text']}"
    elif left := _left(folder, case.made if told["how"] == "refused" else ()):
        found, what = LEFTOVERS, f"{', '.join(left)}; {told['how']}: {told['text']}"
    else:
        found, what = _judged(case, told)
    _remove(folder)
    return Outcome(case.name, found, what, seconds, memory)


def _judged(case: Case, told: dict[str, Any]) -> tuple[str, str]:
    """The class, and what is to be said of it."""
    text = told["text"]
    if told["how"] == "accepted":
        if case.right == "refused":
            return WRONG, f"to be refused, and {text}"
        return (ACCEPTED, text) if told["holds"] else (WRONG, f"wrongly {text}")
    if told["how"] == "traceback":
        return TRACEBACK, text
    if case.right == "accepted":
        return WRONG, f"harmless, and refused: {text}"
    if not 10 < len(text) < 4000 or _unprintable(text):
        return WRONG, f"refused by what is no sentence: {text[:500]!r}"
    if case.named and not any(name in text for name in case.named):
        return WRONG, f"refused without naming {' or '.join(case.named)}: {text}"
    return REFUSED, text


def _unprintable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return not all(character.isprintable() or character == "\n" for character in text)


def _answer(case: Case, folder: Path, answer: Path) -> None:
    """In the fork: what the product does with the input, as JSON."""
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(silent, descriptor)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "temporary")
    told: dict[str, Any]
    try:
        value = case.read(folder)
    except InputError as error:
        told = {"how": "refused", "text": str(error)}
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {str(error)[:500]} ({place.filename}:{place.lineno})"
        told = {"how": "traceback", "text": said}
    else:
        told = _accepted(case, value)
    told["started"] = _memory_of_started()
    answer.write_text(json.dumps(told))


def _memory_of_started() -> int:
    """Bytes that the largest of the processes which it has started had at most; 0 where the system does not tell.

    A process that has ended began with the size of its parent, so that only more than this is known of it.
    """
    running = [0]
    with suppress(OSError):
        for process in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            most = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
            running.append(int(most[1]) * 1024 if most else 0)
    image_check.end()  # as at the end of the program
    ended = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * MAXRSS_UNIT
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    return max(*running, ended if ended > 1.1 * own else 0)


def _accepted(case: Case, value: Any) -> dict[str, Any]:
    try:
        holds = bool(case.holds(value))
        text = f"accepted as {reprlib.repr(value)}"
    except Exception as error:
        holds, text = False, f"accepted, but what it was read as cannot be used: {type(error).__name__}: {error}"
    return {"how": "accepted", "holds": holds, "text": text}


def _waited(process: int, started: float, limits: Limits) -> tuple[int, resource.struct_rusage, int, str]:
    """Exit status, use of resources, the most memory that was seen, and why it was killed, if it was."""
    stopped, looked, seen = "", started, 0
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            return status, usage, seen, stopped
        now = time.monotonic()
        if not stopped and now - started > limits.seconds:
            stopped = HANG
        elif not stopped and now - looked > 0.2:
            looked = now
            seen = max(seen, _resident(process, limits.idle))
            if seen > limits.memory:
                stopped = MEMORY
        if stopped:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        time.sleep(0.002)


def _resident(process: int, idle: int) -> int:
    """Bytes in memory, of a fork beyond what it began with, or of the largest program that it has started."""
    try:
        fork = psutil.Process(process)
        return max(
            fork.memory_info().rss - idle, *(each.memory_info().rss for each in fork.children(recursive=True)), 0
        )
    except psutil.Error:  # it has just ended
        return 0


def _state(path: Path) -> dict[bytes, str]:
    """Every name below a path with its kind and content; nothing is opened but regular files."""
    found = {b"": _content(path)}
    for parent, folders, files in os.walk(os.fsencode(path)):
        for name in [*folders, *files]:
            found[os.path.join(parent, name)] = _content(Path(os.fsdecode(os.path.join(parent, name))))
    return found


def _content(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return "nothing"
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(path)}"
    if stat.S_ISREG(mode):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return str(stat.S_IFMT(mode))


def _left(folder: Path, made: Sequence[str]) -> list[str]:
    """Temporary files, and what a refused input must not have made."""
    found = [
        os.path.join(parent, name)
        for parent, folders, files in os.walk(folder)
        for name in [*folders, *files]
        if Path(parent).name == "temporary" or (name.startswith(".") and name.endswith((".tmp", ".part")))
    ]
    for name in made:
        path = folder / name
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            found.append(str(path))
    return [os.path.relpath(path, folder) for path in found]


def _remove(folder: Path) -> None:
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder)
