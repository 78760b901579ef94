"""Killed at any moment and started again, or run twice at once, the chain leaves the bytes of an undisturbed run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TWICE = """
import sys
from pathlib import Path
from benchmarks import kills

kills.shorten()
root, fresh = Path(sys.argv[1], "workspace"), Path(sys.argv[1], "fresh")
concepts = kills.prepare(root, [])
root.rename(fresh)
kills.copied(fresh, root)
kills.finish(kills.forked(lambda: kills.whole(root, concepts)))
expected = kills.made(root)
kills.copied(fresh, root)
both = [kills.forked(lambda: kills.whole(root, concepts)) for _ in range(2)]
for process in both:
    kills.finish(process)
print(kills.difference(expected, kills.made(root)))
"""


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_at_any_change_of_its_files_a_run_comes_to_the_same_bytes():
    """benchmarks/kills.py kills it at moments in time too, and more often."""
    assert "5 of 5 kills left the same bytes" in run("-m", "benchmarks.kills", "--by", "changes", "--moments", "5")


@pytest.mark.slow
def test_two_runs_over_the_same_cells_at_once_leave_what_one_leaves(tmp_path):
    assert run("-c", TWICE, str(tmp_path)).splitlines()[-1] == "[]"
