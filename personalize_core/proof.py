"""Does an artifact hold all that was learned? A fresh process reads it from disk and draws; the trainer draws too.

What was never written, was read back under another name, or lives on only in the trainer's memory shows as a
difference between the two. Nothing here can change an artifact, only refuse it, so no stamp depends on this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from personalize_core.artifact import restore
from personalize_core.base import BaseModel
from personalize_core.files import save_tensors
from personalize_core.method import Method
from personalize_core.models import load_base_model
from personalize_core.sample import initial_noise, make_sampler, sample

TEMPLATE, STEPS, GUIDANCE = "a photo of a {}", 3, 4.0
ON_GPU = 1e-3  # of the answer's largest number: there, two processes may add up the same numbers in another order


class ProofFailed(RuntimeError):
    """The artifact on disk is not what the trainer has in memory: a fault of ours."""


def answer(method: Method, base: BaseModel) -> Tensor:
    """(1, 4, h, w): latents, after a few steps of the sampler from a noise that never changes."""
    prompts, noise = [method.say(TEMPLATE)], initial_noise(base, 0, [(0, 0)])
    return sample(method, base, prompts, noise, make_sampler("ddim", base), STEPS, GUIDANCE).cpu()


class FreshProcess:
    """Another process, which restores an artifact on a base model that it loads itself, and answers.

    It is started before training, so that importing the libraries, most of its time, need not be waited for: until it
    is told of an artifact it does nothing else, and holds no weights.
    """

    def __init__(self, base: BaseModel) -> None:
        package = Path(__file__).parents[1]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
        self._base, self._folder = base, tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    @property
    def _to(self) -> Path:
        return Path(self._folder.name, "answer.safetensors")

    def restore(self, artifact: Path) -> None:
        """Tell it where the artifact is; returns at once."""
        precision = "fp32" if self._base.dtype == torch.float32 else "bf16"
        told = [artifact, self._base.name, self._base.device.type, precision, torch.get_num_threads(), self._to]
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # it ended already; `answer` says why
            stdin.write(json.dumps([str(each) for each in told]) + "\n")
            stdin.flush()

    def answer(self) -> Tensor:
        """What it drew; waited for.

        Raises:
            ProofFailed: it could draw nothing.
            ChildProcessError: something ended it, which says nothing of the artifact.
        """
        _, said = self._process.communicate()
        if self._process.returncode < 0:
            raise ChildProcessError(
                f"the process that was to draw with the artifact was ended by signal {-self._process.returncode}; "
                "signal 9 is often the system's own, where memory does not suffice"
            )
        if self._process.returncode:
            last = (said.strip() or f"it ended with status {self._process.returncode}").splitlines()[-1]
            raise ProofFailed(f"a fresh process cannot draw with the artifact that was just trained: {last}")
        return load_file(self._to)["answer"]


def compare(trainers: Tensor, restored: Tensor, base: BaseModel) -> dict[str, Any]:
    """What to keep of the proof.

    On a CPU both must agree in every bit; on a GPU to `ON_GPU` of the largest number.

    Raises:
        ProofFailed: they do not agree.
    """
    largest = trainers.abs().max().item()
    difference = (trainers - restored).abs().max().item()
    allowed = 0.0 if base.device.type == "cpu" else ON_GPU * largest
    if not difference <= allowed:  # nor if one of them is not a number
        raise ProofFailed(
            f"the artifact, restored in a fresh process, draws something else than the trainer: its latents differ by "
            f"up to {difference:.3g}, where their largest number is {largest:.3g}; it is not kept"
        )
    return {
        "answer_sha256": sha256(restored.numpy().tobytes()).hexdigest(),
        "identical": torch.equal(trainers, restored),
        "largest_difference": difference,
        "allowed_difference": allowed,
        "template": TEMPLATE,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "device": base.device.type,
    }


def _draw(folder: str, name: str, device: str, precision: str, threads: str, to: str) -> None:
    torch.set_num_threads(int(threads))
    base = load_base_model(name, device, precision)
    save_tensors(Path(to), {"answer": answer(restore(Path(folder), base), base)})


if __name__ == "__main__":
    line = sys.stdin.readline()
    if line:  # else the trainer ended before there was an artifact
        _draw(*json.loads(line))
