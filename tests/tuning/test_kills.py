"""Killed at any moment and started again, or run twice at once, a search leaves what an undisturbed one leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SETUP = """
import json, random, signal, sys
from functools import partial
from pathlib import Path
from benchmarks import kills
from personalize_core.tuning import search
from tests.tuning import searched

kills.shorten()
searched.without_a_clock()
search.UNPRUNED_FIRST = 1
root, fresh, counted = (Path(sys.argv[1], name) for name in ("workspace", "fresh", "counted"))
kills.finish(kills.forked(lambda: searched.make(root, probed=True) and None))
root.rename(fresh)

def whole():
    searched.search(root, minutes=1.8)

def undisturbed():
    count = kills.count_changes(root)
    whole()
    counted.write_text(str(count[0]))

kills.copied(fresh, root)
kills.finish(kills.forked(undisturbed))
changes, expected = int(counted.read_text()), searched.left(root)
result = json.loads(expected["tuning/dreambooth/result.json"])
print([(trial["state"], trial["concepts"]) for trial in result["trials"]])
"""

KILLED = (
    SETUP
    + """
for moment in random.Random(0).sample(range(changes), 3):
    kills.copied(fresh, root)
    status = kills.wait(kills.forked(lambda: (kills.count_changes(root, moment), whole()) and None))
    assert status == -signal.SIGKILL, status
    kills.finish(kills.forked(whole))
    print(moment, kills.difference(expected, searched.left(root)))
"""
)

AT_EVENTS = (
    SETUP
    + """
from personalize_core.steps.probing import Eye

def in_a_probe(number):
    kills.kill_behind_call(Eye, "look", number)
    whole()

def before(text):
    kills.count_changes(root, text)
    whole()

moments = {"in a probe": lambda: in_a_probe(5)} | {text: partial(before, text) for text in sys.argv[2:]}
for moment, run in moments.items():
    kills.copied(fresh, root)
    status = kills.wait(kills.forked(run))
    assert status == -signal.SIGKILL, (moment, status)
    kills.finish(kills.forked(whole))
    print(moment, kills.difference(expected, searched.left(root)))
"""
)

TWICE = (
    SETUP
    + """
kills.copied(fresh, root)
both = [kills.forked(whole) for _ in range(2)]
for process in both:
    kills.finish(process)
print(kills.difference(expected, searched.left(root)))
"""
)


def run(code: str, folder: Path, *more: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_killed_at_any_change_of_its_files_a_search_comes_to_the_same_bytes(tmp_path):
    lines = run(KILLED, tmp_path)
    assert "('pruned', 1)" in lines[0] or "('pruned', 0)" in lines[0]
    assert len(lines) == 4 and all(line.endswith(" []") for line in lines[1:]), lines


@pytest.mark.slow
def test_killed_in_a_trial_its_repeats_or_the_report_it_comes_to_the_same_bytes(tmp_path):
    """In a probe of a trial, and before the first change to what these paths hold."""
    again = "measured/6"  # of today's recipe, trained again with the next seed: the workspace has 5
    places = ("journal.jsonl", "trials/000/measured", again, "report.parquet")
    lines = run(AT_EVENTS, tmp_path, *places)
    assert len(lines) == 2 + len(places) and all(line.endswith(" []") for line in lines[1:]), lines


@pytest.mark.slow
def test_two_searches_at_once_leave_what_one_leaves(tmp_path):
    assert run(TWICE, tmp_path)[-1] == "[]"
