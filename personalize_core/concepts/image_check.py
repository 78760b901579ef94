"""Images from outside are decoded in another process first, with limits of memory and time.

A file of a few kilobytes can ask a decoder for gigabytes or minutes, or end the interpreter. Here this happens to a
process of which nothing else depends. It is started for the first image, answers for all later ones, and ends with the
program.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from personalize_core.errors import InputError

CPU_SECONDS = 30.0  # for one image; one of 100 megapixels took up to 10 on a busy core of 2.5 GHz
WAIT_SECONDS = 300  # for one image, on a machine that does other work or waits for a network's disk
MEMORY = 4 * 2**30  # bytes of address space; an image of 100 megapixels took up to 2.8 GB
NO_MEMORY = 3  # the process's exit code
# each thread takes address space
_FEW_THREADS = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None
_known: dict[tuple[str | int, ...], tuple[int, int]] = {}  # what a file was by name, size and times -> its size


def check_images(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Width and height of each of these images, after it has been decoded once in another process.

    A file that has been checked is decoded again when its size, times or inode have changed.

    Raises:
        InputError: one cannot be read as an image, or takes too much memory or time.
    """
    return [_checked(path) for path in paths]


def _checked(path: Path) -> tuple[int, int]:
    from personalize_core.files.atomic import TICK

    try:
        about = path.stat()
    except (OSError, ValueError):
        return _decoded(path)  # which says why
    state = (str(path.absolute()), about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if state not in _known:
        settled = max(about.st_mtime_ns, about.st_ctime_ns) < time.time_ns() - TICK  # else its times may stay the same
        size = _decoded(path)
        if not settled:
            return size
        if len(_known) >= 20_000:
            _known.clear()
        _known[state] = size
    return _known[state]


def _decoded(path: Path) -> tuple[int, int]:
    with _lock:
        process = _started()
        folder = Path("/") if path.is_absolute() else Path.cwd()
        answer = _asked(process, f"{os.fsencode(folder).hex()} {os.fsencode(path).hex()}")
        if answer is None:
            code = process.wait()
            end()
    if answer is None:
        from personalize_core.concepts.image_files import MEND  # here, for Pillow's time

        raise InputError(f"{path} cannot be read as an image: {_how_it_ended(code)}; {MEND}")
    if isinstance(answer, str):
        raise InputError(answer)
    width, height = answer
    return width, height


def _how_it_ended(code: int) -> str:
    if code == NO_MEMORY:
        return f"decoding it takes more than {MEMORY / 2**30:.1f} GB of memory"
    if code == -getattr(signal, "SIGPROF", 0):
        return f"decoding it takes more than {CPU_SECONDS:g} seconds"
    if code == -getattr(signal, "SIGKILL", 0):
        return f"decoding it was ended after {WAIT_SECONDS} seconds, or by the system for want of memory"
    return f"decoding it ends the decoder (exit code {code})"


def _asked(process: subprocess.Popen[bytes], question: str) -> str | list[int] | None:
    """The process's answer; None if it has ended without one."""
    assert process.stdin and process.stdout
    limit = threading.Timer(WAIT_SECONDS, process.kill)
    limit.daemon = True
    limit.start()
    try:
        process.stdin.write(question.encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:
        line = b""
    finally:
        limit.cancel()
    return json.loads(line) if line.endswith(b"\n") else None


def _started() -> subprocess.Popen[bytes]:
    global _process
    if _process is None or _process.poll() is not None:
        end()
        package = str(Path(__file__).parents[2])
        found = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        # -P: a file of the current folder must not be imported in place of a module
        _process = subprocess.Popen(
            [sys.executable, "-P", "-m", "personalize_core.concepts.image_check", str(MEMORY), str(CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": found} | _FEW_THREADS,
        )
        if _asked(_process, "") != "ready":
            raise RuntimeError(f"the process that checks images does not start; it ended with {_process.poll()}")
    return _process


def end() -> None:
    """End the process, if there is one; the next check starts another."""
    global _process
    if _process is not None:
        _process.kill()
        _process.wait()
        _close_pipes(_process)
        _process = None


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with suppress(OSError):
                pipe.close()


def _forget() -> None:
    """In a fork: the process belongs to the parent."""
    global _process, _lock
    if _process is not None:
        _close_pipes(_process)
        _process.returncode = 0  # so that nobody here waits for it
    _process, _lock = None, threading.Lock()


atexit.register(end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def main(memory: int, cpu_seconds: float) -> None:
    """Answer each line of standard input with one of JSON: an image's [width, height], or why there is none.

    A line holds a folder and the image's path from there, in hexadecimal digits. An empty one is answered by "ready".
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program decides when both end
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # whose stacks would count as memory
    for line in sys.stdin.buffer:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # ends this process
        words = [os.fsdecode(bytes.fromhex(word.decode())) for word in line.split()]
        print(json.dumps(_answer(*words) if words else "ready"), flush=True)


def _answer(folder: str, path: str) -> str | tuple[int, int]:
    from personalize_core.concepts.image_files import load_image

    os.chdir(folder)
    try:
        return load_image(Path(path)).size
    except InputError as error:
        return str(error)
    except MemoryError:
        sys.exit(NO_MEMORY)  # the next image gets a new process


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
