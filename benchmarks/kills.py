"""Kill a whole run at random moments: `python -m benchmarks.kills [--moments 20] [--by seconds|changes] [--seed 0]`.

The chain of `personalize run` (train, sample, score, compare, report) runs in a process group of its own. At a random
moment the whole group gets signal 9; then the same run is started again. The workspace must then hold, byte for byte,
what an undisturbed run leaves, with no partial file and no checkpoint. A moment is a time, or, with --by changes, the
one before a change to a file: a rename, an opening for writing, a removal. Checkpoints are written after every step, so
that most moments of a training fall between two of them.

By default it uses the tests' tiny models: one concept, the base model and three methods. Artifacts are checked in the
same process, because a fresh one would spend most of its time on imports, and plots are small stand-ins; --fresh checks
and plots as the product does. With --mini CONCEPT... it uses the embedded miniature and the recipes of params.yaml.
Runs are forked from a process that has imported all libraries and computed nothing, so that the moments fall into the
work.

Two undisturbed runs differ in the seconds they took. Of data/costs, and of the report, which states them, only the
presence is checked.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import personalize_core  # noqa: F401  first: without it diffusers does not import beside the CPU build of torch
from personalize_core import steps
from personalize_core.artifacts import proof
from personalize_core.report import comparison
from personalize_core.report.figures import losses
from personalize_core.steps import training
from personalize_core.workspace.store import Store
from tests import tiny_workspace
from tests.conftest import ThisProcess, quick_loss_curve, quick_scatter_plot

ROOT = Path(__file__).parents[1]
METHODS = ("base_model", "textual_inversion", "dreambooth", "personalized_residuals")
TIMED = ("costs", "report")  # folders of data/ that state seconds
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

training.TimedCheckpoints = partial(training.TimedCheckpoints, every_seconds=0, share=math.inf)


def whole(root: Path, concepts: list[str]) -> None:
    """What `personalize run` does."""
    store = Store(root)
    for concept in concepts:
        for method in METHODS:
            for step in (steps.train, steps.sample_grid, steps.score):
                step(store, concept, method)
        steps.score_references(store, concept)
    steps.compare(store)
    steps.report(store)


def count_changes(root: Path, kill_at: int | str | None = None) -> list[int]:
    """Count the changes to files in the workspace from now on; kill the whole group before one of them.

    kill_at: which, from 0, or the first one whose path holds this text.
    """
    count, beneath = [0], str(root)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and bool((arguments[2] or 0) & WRITING))
        if changes and str(arguments[0]).startswith(beneath):
            if count[0] == kill_at or (isinstance(kill_at, str) and kill_at in str(arguments[0])):
                os.killpg(0, signal.SIGKILL)
            count[0] += 1

    sys.addaudithook(hear)
    return count


def kill_behind_call(owner: type, method: str, number: int) -> None:
    """Kill the whole group when this method of a class has been called so many times from now on."""
    whole, calls = getattr(owner, method), itertools.count(1)

    def called(*args: Any, **options: Any) -> Any:
        result = whole(*args, **options)
        if next(calls) == number:
            os.killpg(0, signal.SIGKILL)
        return result

    setattr(owner, method, called)


def forked(do: Callable[[], None]) -> int:
    """Start it in a process group of its own. Returns the process id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    os.setsid()
    status = 1
    try:
        do()
        status = 0
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(process: int) -> int:
    """Wait for it. Returns the exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def finish(process: int) -> None:
    if status := wait(process):
        sys.exit(f"the run ended with status {status}")


def killed_after(process: int, seconds: float) -> bool:
    """Kill the whole group at that moment, as a power cut would, unless the run has ended before."""
    time.sleep(seconds)
    ended = os.waitpid(process, os.WNOHANG)[0] != 0
    if not ended:
        os.killpg(process, signal.SIGKILL)
        wait(process)
    return not ended


def made(root: Path) -> dict[str, bytes]:
    """What a run leaves: path -> content; for files that state seconds, only their presence."""
    data, found = root / "data", {}
    for path in sorted(data.rglob("*")):
        name = path.relative_to(data)
        if path.is_file() and name.parts[:2] != (".work", "locks"):
            found[name.as_posix()] = b"" if name.parts[0] in TIMED else path.read_bytes()
    return found


def difference(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    every = sorted(expected.keys() | found.keys())
    return [name for name in every if expected.get(name) != found.get(name)]


def shorten() -> None:
    """Leave out what takes time and writes no files of its own: imports of a fresh process, and plotting."""
    proof.FreshProcess = ThisProcess
    losses.loss_curve = quick_loss_curve
    comparison.save_scatter_plot = quick_scatter_plot


def copied(source: Path, target: Path) -> None:
    """An empty workspace at the path of the last one, because the base model's name is a path in it."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)


def prepare(root: Path, mini: list[str]) -> list[str]:
    """Fill a workspace. Returns the concepts to run."""
    if not mini:
        finish(forked(lambda: tiny_workspace.make(root) and None))
        return ["rex"]
    for name in mini:
        shutil.copytree(ROOT / "data" / "concepts" / name, root / "data" / "concepts" / name)
    for name in ("prompts", "protocols"):
        shutil.copytree(ROOT / "data" / name, root / "data" / name)
    shutil.copy(ROOT / "params.yaml", root)
    return mini


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--moments", type=int, default=20)
    arguments.add_argument("--by", choices=["seconds", "changes"], default="seconds")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--fresh", action="store_true", help="check artifacts in fresh processes")
    arguments.add_argument("--mini", nargs="+", default=[], metavar="CONCEPT")
    chosen = arguments.parse_args()
    generator, wrong = random.Random(chosen.seed), 0
    if not (chosen.fresh or chosen.mini):
        shorten()

    with tempfile.TemporaryDirectory() as temporary:
        root, fresh, counted = (Path(temporary, name) for name in ("workspace", "fresh", "counted"))
        concepts = prepare(root, chosen.mini)
        root.rename(fresh)

        def undisturbed() -> None:
            count = count_changes(root)
            whole(root, concepts)
            counted.write_text(str(count[0]))

        copied(fresh, root)
        begun = time.monotonic()
        finish(forked(undisturbed))
        seconds, changes, expected = time.monotonic() - begun, int(counted.read_text()), made(root)
        print(f"undisturbed: {len(expected)} files by {changes} changes in {seconds:.1f} s", flush=True)

        for number in range(1, chosen.moments + 1):
            while True:
                copied(fresh, root)
                if chosen.by == "changes":
                    moment = generator.randrange(changes)
                    when = f"before change {moment}"
                    process = forked(
                        lambda moment=moment: (count_changes(root, moment), whole(root, concepts)) and None
                    )
                    if wait(process) == -signal.SIGKILL:
                        break
                else:
                    moment = generator.uniform(0, seconds)
                    when = f"after {moment:.1f} s"
                    if killed_after(forked(lambda: whole(root, concepts)), moment):
                        break
            there = made(root)
            final = len([name for name in there if there[name] == expected.get(name)])
            finish(forked(lambda: whole(root, concepts)))
            others = difference(expected, made(root))
            wrong += bool(others)
            verdict = others or "the same bytes"
            print(f"{number:3d}. killed {when}, with {final} of {len(expected)} files there: {verdict}", flush=True)
    print(f"{chosen.moments - wrong} of {chosen.moments} kills left the same bytes")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
