"""Killed in a probe or between the files of what was seen, a training sees, decides and keeps what it would have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("stages.json", "probes.parquet", "probes.png", "probe_images.png", "manifest.json")

KILLED = """
import signal, sys
from pathlib import Path
from benchmarks import kills
from personalize_core import steps
from personalize_core.files.atomic import read_json
from personalize_core.steps.probing import Eye
from personalize_core.training.probe_files import ENDED
from personalize_core.workspace.store import Store
from tests.steps.test_probing import METHOD, make

kills.shorten()
root, fresh = (Path(sys.argv[1], name) for name in ("workspace", "fresh"))
by_probes = {"stop": "probes", "patience": 2, "keep": "best", "by": "identity", "share": 0.5}
kills.finish(kills.forked(lambda: make(root, {"adaptive": by_probes, "lr": 0.05}, held_out=2) and None))
root.rename(fresh)

def whole():
    steps.train(Store(root), "rex", METHOD)

def in_a_probe(number):
    kills.kill_behind_call(Eye, "look", number)
    whole()

def before(name):
    kills.count_changes(root, name)
    whole()

kills.copied(fresh, root)
kills.finish(kills.forked(whole))
expected = kills.made(root)
print(read_json(Store(root).artifact(METHOD, "rex") / ENDED))
moments = {f"in probe {n}": lambda n=n: in_a_probe(n) for n in (1, 2, 3)}
moments |= {f"before {name}": lambda name=name: before(name) for name in sys.argv[2:]}
for moment, run in moments.items():
    kills.copied(fresh, root)
    status = kills.wait(kills.forked(run))
    assert status == -signal.SIGKILL, (moment, status)
    kills.finish(kills.forked(whole))
    print(moment, kills.difference(expected, kills.made(root)))
"""


@pytest.mark.slow
def test_killed_in_a_probe_or_between_its_files_it_leaves_the_same_bytes(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), *PLACES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    _, *lines = done.stdout.splitlines()
    assert len(lines) == 3 + len(PLACES) and all(line.endswith(" []") for line in lines), lines
