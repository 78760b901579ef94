"""Services start in order and end together, whatever they do about signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# A service that says in a file which processes it consists of, itself and a child, and then waits for ever. Both ignore
# what signals they can, as a process does that was started in the background.
STUBBORN = """
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.replace(sys.argv[1] + ".new", sys.argv[1])
signal.pause()
"""
POLITE = "import signal, sys; print('started', flush=True); signal.pause()"
SUPERVISOR = """
import os, sys
from pathlib import Path
from pipelines.server import services
services.GRACE = 0.2
folder, stubborn, last = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
ready = folder / "ready"
first = services.Service("first", [sys.executable, "-c", stubborn, str(ready)], graceful=False, ready=ready)
second = services.Service("second", [sys.executable, "-c", last])
sys.exit(services.run([first, second], os.environ))
"""


def supervisor(folder: Path, last: str, ignoring: bool = False) -> subprocess.Popen[str]:
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(folder), STUBBORN, last],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=ignore if ignoring else None,
    )


def are_gone(folder: Path) -> bool:
    pids = [int(pid) for pid in (folder / "ready").read_text().split()]
    assert len(pids) == 2
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process_also_where_it_was_ignored_at_the_start(number, tmp_path):
    running = supervisor(tmp_path, POLITE, ignoring=True)
    assert running.stdout and running.stdout.readline() == "started\n"  # so the first one is ready
    os.kill(running.pid, number)
    assert running.wait() == 0
    assert are_gone(tmp_path)


def test_what_a_killed_service_started_ends_too(tmp_path):
    running = supervisor(tmp_path, POLITE)
    assert running.stdout and running.stdout.readline() == "started\n"
    os.kill(int((tmp_path / "ready").read_text().split()[0]), signal.SIGKILL)
    assert running.wait() == 1
    assert are_gone(tmp_path)


def test_a_service_that_ends_by_itself_ends_the_others(tmp_path):
    running = supervisor(tmp_path, "import sys; sys.exit(7)")
    said, _ = running.communicate()
    assert running.returncode == 1
    assert said == "personalize: the second ended with exit code 7, so everything else is ended too\n"
    assert are_gone(tmp_path)
