"""What training and sampling take: seconds and memory. They differ from run to run, so they stand in no artifact."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.files.atomic import read_json, write_json
from personalize_core.training.checkpoints import Checkpoints, Resumed

if TYPE_CHECKING:
    import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux only


@dataclass
class Stopwatch:
    """Seconds of steps, over all sessions of a run that was cut off; None where an earlier session's are unknown."""

    seconds: float | None = 0.0
    since: float = field(default_factory=time.monotonic)

    def lap(self) -> None:
        """What passed since the last lap counts."""
        if self.seconds is not None:
            self.seconds += time.monotonic() - self.since
        self.since = time.monotonic()

    def skip(self) -> None:
        """What passed since the last lap does not."""
        self.since = time.monotonic()


@dataclass
class TimedCheckpoints(Checkpoints):
    """Checkpoints that remember how many seconds the steps took that lead to them, and, apart from them, the probes.

    What is lost and done again counts once. Reading and writing checkpoints does not count.
    """

    watch: Stopwatch = field(default_factory=Stopwatch)
    probing: float | None = 0.0  # seconds; None where an earlier session's are unknown

    @property
    def laps(self) -> Path:
        return self.folder / "seconds.json"

    def load(self) -> Resumed:
        resumed = super().load()
        if resumed.tensors:
            try:
                self.watch.seconds, self.probing = read_json(self.laps)[_key((resumed.stage, resumed.step))]
            except (OSError, ValueError, KeyError, TypeError):
                self.watch.seconds = self.probing = None
        else:
            self.laps.unlink(missing_ok=True)
        self.watch.skip()
        return resumed

    def save(self, position: tuple[int, int], *state: Any) -> None:
        """First the seconds, beside those of the checkpoint before: whichever is there in the end finds its own."""
        self.writes.wait()
        try:
            known = list(read_json(self.laps).items())[-1:]
        except (OSError, ValueError, AttributeError):
            known = []
        write_json(self.laps, dict(known) | {_key(position): [self.watch.seconds, self.probing]})
        super().save(position, *state)
        self.watch.skip()

    def probed(self, seconds: float) -> None:
        """A probe is over, which took so long."""
        if self.probing is not None:
            self.probing += seconds
        self.watch.skip()

    @property
    def costs(self) -> dict[str, float]:
        """The seconds of all sessions, as far as they are known."""
        known = {"training_seconds": self.watch.seconds, "probe_seconds": self.probing}
        return {name: seconds for name, seconds in known.items() if seconds is not None}

    def clear(self) -> None:
        """With whatever half a file a killed process left beside them; the folders of other trainings stay."""
        super().clear()
        for path in self.folder.glob("*"):
            if path.is_file():
                path.unlink(missing_ok=True)


def _key(position: tuple[int, int]) -> str:
    stage, step = position
    return f"{stage:06d}/{step:09d}"  # in order as text too, for JSON is written sorted


class PeakMemory:
    """The most memory that was held at once from here on."""

    def __init__(self, device: torch.device | str) -> None:
        import torch

        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):
            _RESET.write_text("5")  # proc(5): sets the peak to what is resident now
        status = _memory_of_process()  # some kernels take what was written and reset nothing
        self.since_here = "VmHWM" in status and status["VmHWM"] <= 1.01 * status["VmRSS"]

    def costs(self) -> dict[str, Any]:
        """The bytes, what they are of, and on which device; without bytes where the system does not tell."""
        import torch

        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            held, of = torch.cuda.max_memory_allocated(self.device), "tensors on the graphics card"
        else:
            name, held = f"CPU, {torch.get_num_threads()} threads", _resident_peak()
            of = "resident set of the process" + ("" if self.since_here else " since it started")
        return {"device": name, "memory_of": of} | ({} if held is None else {"peak_memory_bytes": held})


def _memory_of_process() -> dict[str, int]:
    """Bytes, by the names of proc(5); nothing where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return {name: int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")}
    except (OSError, KeyError, ValueError):
        return {}


def _resident_peak() -> int | None:
    if held := _memory_of_process().get("VmHWM"):
        return held
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
