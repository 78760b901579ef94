"""Does an artifact hold all that was learned? A fresh process reads it from disk and samples; so does the trainer.

Both show the same: every tensor of the method, which must agree in every bit on every device, and a sample, which may
differ by rounding on a GPU. What was never written, was read back under another name, or lives on only in the trainer's
memory shows as a difference. Nothing here can change an artifact, only refuse it, so no stamp depends on this file.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from personalize_core.artifacts.saving import restore
from personalize_core.base_model.determinism import set_deterministic
from personalize_core.base_model.loading import load_base_model
from personalize_core.base_model.model import BaseModel
from personalize_core.errors import listed
from personalize_core.files.atomic import save_tensors
from personalize_core.methods.interface import Method
from personalize_core.sampling.sampler import initial_noise, make_sampler, sample

TEMPLATE, STEPS, GUIDANCE = "a photo of a {}", 3, 4.0
SHOWN = 3  # tensors that a message names

# Of the largest latent, on a GPU: there two processes may use other kernels, which add up the same numbers in another
# order (docs/reproducibility.md has what was measured).
ON_GPU = {torch.float32: 2.5e-2, torch.bfloat16: 2e-1}  # TF32 has three bits more than bfloat16


class ProofFailed(RuntimeError):
    """The artifact on disk is not what the trainer has in memory: a fault of ours."""


@dataclass(frozen=True)
class Evidence:
    """What shows whether two processes hold the same method."""

    latents: Tensor  # (1, 4, h, w): sampled, see `sampled_latents`
    hashes: dict[str, str]  # name of each tensor of the method -> SHA-256 of its type, shape and bytes


def evidence(method: Method, base: BaseModel) -> Evidence:
    return Evidence(sampled_latents(method, base), tensor_hashes(method))


def sampled_latents(method: Method, base: BaseModel) -> Tensor:
    """(1, 4, h, w): latents, after a few steps of the sampler from a noise that never changes."""
    prompts, noise = [method.say(TEMPLATE)], initial_noise(base, 0, [(0, 0)])
    return sample(method, base, prompts, noise, make_sampler("ddim", base), STEPS, GUIDANCE).cpu()


def tensor_hashes(method: Method) -> dict[str, str]:
    """Of what an artifact keeps, by name."""
    return {name: _hash(tensor.detach().cpu()) for name, tensor in sorted(method.state_dict().items())}


def _hash(tensor: Tensor) -> str:
    found = sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class FreshProcess:
    """Another process, which restores an artifact on a base model that it loads itself, and samples.

    It is asked for before training, so that importing the libraries, most of its time, need not be waited for: until it
    is told of an artifact it does nothing else, and holds no weights.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base, self._folder = base, tempfile.TemporaryDirectory()
        self._forks = base.device.type == "cpu" and hasattr(os, "fork")
        self._reader, self._reusable = _Reader.idle_or_new(), True

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._reusable:
            self._reader.keep()
        else:
            self._reader.end()
        self._folder.cleanup()

    @property
    def _to(self) -> Path:
        return Path(self._folder.name, "evidence.safetensors")

    def restore(self, artifact: Path) -> None:
        """Tell it where the artifact is; returns at once."""
        self._reusable = False  # while it samples
        self._reader.tell(
            fork=self._forks,
            folder=str(artifact),
            name=self._base.name,
            device=self._base.device.type,
            precision="fp32" if self._base.dtype == torch.float32 else "bf16",
            image_size=self._base.image_size,
            threads=torch.get_num_threads(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            to=str(self._to),
        )

    def evidence(self) -> Evidence:
        """What it restored, and sampled; waited for.

        Raises:
            ProofFailed: it could sample nothing.
            ChildProcessError: something ended it, which says nothing of the artifact.
        """
        status, said = self._reader.heard()
        if status < 0:
            raise ChildProcessError(
                f"the process that was to sample with the artifact was ended by signal {-status}; "
                "signal 9 is often the system's own, where memory does not suffice"
            )
        if status:
            last = (said.strip() or f"it ended with status {status}").splitlines()[-1]
            raise ProofFailed(f"a fresh process cannot sample with the artifact that was just trained: {last}")
        self._reusable = self._forks
        with safe_open(self._to, framework="pt") as shown:
            return Evidence(shown.get_tensor("latents"), json.loads(shown.metadata()["hashes"]))


class _Reader:
    """A process that has imported the libraries and waits to be told of artifacts.

    On a CPU each is restored by a fork of its own, which inherits what was imported and nothing else; so importing is
    paid for once, not once for each training. A graphics card that was looked at before a fork cannot be used after it:
    there, and where there are no forks, the process restores one artifact itself, and ends.
    """

    _idle: ClassVar[list[_Reader]] = []

    @classmethod
    def idle_or_new(cls) -> _Reader:
        while cls._idle:
            reader = cls._idle.pop()
            if reader._process.poll() is None:
                reader._said.truncate(0)
                return reader
            reader.end()
        return cls()

    def __init__(self) -> None:
        package = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
        self._said = tempfile.TemporaryFile(mode="a+")  # appended to, by it and by its forks
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def tell(self, **what: Any) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # it ended already; `heard` says why
            stdin.write(json.dumps(what) + "\n")
            stdin.flush()

    def heard(self) -> tuple[int, str]:
        """How restoring ended, below 0 by which signal, and what was said meanwhile; waited for."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        status = int(line) if line else self._process.wait()
        self._said.seek(0)
        return status, self._said.read()

    def keep(self) -> None:
        """For the next training of this program."""
        self._idle.append(self)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    @classmethod
    def end_all(cls) -> None:
        while cls._idle:
            cls._idle.pop().end()


atexit.register(_Reader.end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Reader._idle.clear)  # they are the parent's


def compare(trainers: Evidence, restored: Evidence, base: BaseModel) -> dict[str, Any]:
    """What to keep of the proof.

    Every tensor must agree in every bit. So must the samples on a CPU; on a GPU, to `ON_GPU` of the largest number.

    Raises:
        ProofFailed: they do not agree.
    """
    names = sorted(trainers.hashes.keys() | restored.hashes.keys())
    if others := [name for name in names if trainers.hashes.get(name) != restored.hashes.get(name)]:
        raise ProofFailed(
            f"the artifact, restored in a fresh process, holds something else than the trainer: {len(others)} of "
            f"{len(names)} tensors differ ({listed(others, SHOWN)}); it is not kept"
        )
    largest = trainers.latents.abs().max().item()
    difference = (trainers.latents - restored.latents).abs().max().item()
    allowed = 0.0 if base.device.type == "cpu" else ON_GPU[base.dtype] * largest
    if not difference <= allowed:  # nor if one of them is not a number
        raise ProofFailed(
            f"the artifact, restored in a fresh process, samples something else than the trainer: its latents "
            f"differ by up to {difference:.3g}, where their largest number is {largest:.3g}; it is not kept"
        )
    return {
        "latents_sha256": sha256(restored.latents.numpy().tobytes()).hexdigest(),
        "equal_tensors": len(names),
        "identical": torch.equal(trainers.latents, restored.latents),
        "largest_difference": difference,
        "allowed_difference": allowed,
        "template": TEMPLATE,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "device": base.device.type,
    }


def _draw(
    folder: str, name: str, device: str, precision: str, image_size: int, threads: int, deterministic: bool, to: str
) -> None:
    torch.set_num_threads(threads)
    set_deterministic(deterministic)
    base = load_base_model(name, device, precision, image_size)
    shown = evidence(restore(Path(folder), base), base)
    save_tensors(Path(to), {"latents": shown.latents}, {"hashes": json.dumps(shown.hashes)})


def _serve() -> None:
    """Restore what each line of the input names, and tell how it ended."""
    for line in sys.stdin:
        told = json.loads(line)
        if not told.pop("fork"):
            _draw(**told)
            print(0, flush=True)
            return
        child = os.fork()
        if not child:
            status = 1
            try:
                _draw(**told)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:  # not to the end of the program, which is the parent's to end
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
