"""An artifact is published only after a fresh process has drawn with it what the trainer draws, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from personalize_core import steps
from personalize_core.artifacts import proof, saving
from personalize_core.files.atomic import save_tensors
from personalize_core.methods import METHOD_NAMES, is_trained, method_class
from personalize_core.workspace.store import Store
from tests import tiny_workspace
from tests.conftest import disturbed, tiny_base

FreshProcess = proof.FreshProcess  # before conftest's fixture replaces it
LATENTS = torch.linspace(-2, 2, 256).reshape(1, 4, 8, 8)


def sampling(latents: torch.Tensor, **hashes: str) -> proof.Evidence:
    return proof.Evidence(latents, hashes)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_workspace.make(tmp_path_factory.mktemp("workspace")).root


def store_for(workspace: Path, method: str, **more: Any) -> Store:
    values = tiny_workspace.params(workspace) | more
    kind = method_class(method)
    short = {name: 2 for name in vars(kind.Config()) if name.endswith(("steps", "batch_size"))}
    if kind.Config().class_images_needed:
        short["class_images"] = 2
    values["methods"] = {"base_model": {}, method: {values["base_model"]: short}}
    return tiny_workspace.write_params(workspace, values)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "FreshProcess", FreshProcess)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), [("vico", "fp32"), ("neti", "bf16")])  # buffers, some of them random
def test_a_fresh_process_samples_from_disk_what_the_trainer_samples_from_memory(method, precision, workspace, fresh):
    store = store_for(workspace, method, precision=precision)
    report = steps.train(store, "rex", method)
    kept = json.loads((report.path / "proof.json").read_text())
    assert kept["identical"] and kept["largest_difference"] == kept["allowed_difference"] == 0
    assert report.metrics["restored_samples_otherwise_by"] == 0
    assert steps.train(store, "rex", method).metrics == report.metrics  # also when it was there already


@pytest.mark.slow
def test_what_a_fresh_process_cannot_restore_is_not_published(workspace, fresh, monkeypatch):
    store = store_for(workspace, "textual_inversion", seed=1)
    monkeypatch.setattr(saving, "save_tensors", lambda path, tensors: path.write_bytes(b"half a file"))
    with pytest.raises(proof.ProofFailed, match="cannot sample with the artifact .* holds a damaged artifact"):
        steps.train(store, "cup", "textual_inversion")
    assert not store.artifact("textual_inversion", "cup").exists()


def ended(process: subprocess.Popen) -> bool:
    return process.poll() is not None


@pytest.mark.slow
def test_one_process_imports_for_all_trainings_of_a_program(workspace, fresh):
    readers = set()
    for seed in (4, 5):
        kept = steps.train(store_for(workspace, "dreambooth", seed=seed), "rex", "dreambooth").path / "proof.json"
        assert json.loads(kept.read_text())["identical"]
        readers |= set(proof._Reader._idle)
    assert len(readers) == 1


def test_trainings_at_the_same_time_have_a_process_each():
    with FreshProcess(tiny_base()) as one, FreshProcess(tiny_base()) as another:
        assert one._reader is not another._reader
    assert set(proof._Reader._idle) == {one._reader, another._reader}
    proof._Reader.end_all()
    assert ended(one._reader._process) and ended(another._reader._process)


def test_a_process_that_is_still_sampling_ends_with_the_training_that_gave_it_up():
    with FreshProcess(tiny_base()) as started:
        process = started._reader._process
        started.restore(Path("somewhere"))
        assert not ended(process)
    assert ended(process) and not proof._Reader._idle


def test_a_process_on_a_graphics_card_restores_once(monkeypatch):
    base = tiny_base()
    base.device = torch.device("cuda")
    with FreshProcess(base) as started:
        monkeypatch.setattr(started._reader, "heard", lambda: (0, ""))
        started.restore(Path("somewhere"))
        save_tensors(started._to, {"latents": LATENTS}, {"hashes": '{"embedding": "1a"}'})
        shown = started.evidence()
        assert torch.equal(shown.latents, LATENTS) and shown.hashes == {"embedding": "1a"}
        process = started._reader._process
    assert ended(process) and not proof._Reader._idle


def test_the_process_ends_with_the_program():
    program = """
from personalize_core.artifacts import proof
from tests.conftest import tiny_base
with proof.FreshProcess(tiny_base()) as started:
    pass
print(started._reader._process.pid)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    with pytest.raises(ProcessLookupError):
        os.kill(int(said), 0)


def test_a_fresh_process_that_was_killed_says_nothing_of_the_artifact():
    with FreshProcess(tiny_base()) as started:
        started._reader._process.kill()
        with pytest.raises(ChildProcessError, match="ended by signal 9"):
            started.evidence()


def test_a_fork_that_was_killed_says_nothing_of_the_artifact(tmp_path, monkeypatch):
    killed = "import os, signal\nos.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
    (tmp_path / "sitecustomize.py").write_text(killed)  # at its birth: before it could end by itself
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    proof._Reader.end_all()
    with FreshProcess(tiny_base()) as started:
        process = started._reader._process
        started.restore(Path("somewhere"))
        with pytest.raises(ChildProcessError, match="ended by signal 9"):
            started.evidence()
        assert not ended(process)
    assert ended(process)


LEARNING = [name for name in METHOD_NAMES if is_trained(name)]


@pytest.mark.parametrize("method", LEARNING)
def test_what_every_method_learns_comes_back_whole(method, workspace):
    """In this process, for time; restored onto the same base model."""
    report = steps.train(store_for(workspace, method), "rex", method)
    assert json.loads((report.path / "proof.json").read_text())["identical"]


def test_an_artifact_that_lost_a_little_precision_is_not_published(workspace, monkeypatch):
    store, save = store_for(workspace, "dreambooth", seed=2), saving.save_tensors
    before = steps.train(store, "cup", "dreambooth")
    kept = {path.name: path.read_bytes() for path in before.path.iterdir()}

    def rounded(path, tensors):
        save(path, {name: tensor.bfloat16().float() for name, tensor in tensors.items()})

    monkeypatch.setattr(saving, "save_tensors", rounded)
    with pytest.raises(proof.ProofFailed, match=r"holds something else than the trainer: \d+ of \d+ tensors differ \("):
        steps.train(store_for(workspace, "dreambooth", seed=3), "cup", "dreambooth")
    assert {path.name: path.read_bytes() for path in before.path.iterdir()} == kept


def test_where_nothing_is_trained_there_is_nothing_to_prove(workspace):
    report = steps.train(store_for(workspace, "dreambooth"), "rex", "base_model")
    assert not (report.path / "proof.json").exists() and "restored_samples_otherwise_by" not in report.metrics


def test_what_is_sampled_depends_on_what_was_learned(concept):
    base, kind = tiny_base(), method_class("textual_inversion")
    method = kind(kind.Config(), base, concept)
    before = proof.sampled_latents(method, base)
    assert torch.equal(proof.sampled_latents(method, base), before)
    assert not torch.equal(proof.sampled_latents(disturbed(method), base), before)


def test_on_a_cpu_every_bit_must_agree():
    base, other = tiny_base(), LATENTS.clone()
    assert proof.compare(sampling(LATENTS), sampling(other), base)["identical"]
    other[0, 0, 0, 0] = torch.nextafter(other[0, 0, 0, 0], torch.tensor(9.0))
    with pytest.raises(proof.ProofFailed, match="samples something else than the trainer: its latents differ by up to"):
        proof.compare(sampling(LATENTS), sampling(other), base)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 0.05), (torch.bfloat16, 0.4)])
def test_on_a_gpu_rounding_of_the_unets_type_is_allowed(dtype, allowed):
    base = tiny_base(dtype=dtype)
    base.device = torch.device("cuda")
    kept = proof.compare(sampling(LATENTS), sampling(LATENTS + 0.95 * allowed), base)
    assert not kept["identical"] and kept["allowed_difference"] == pytest.approx(allowed)
    with pytest.raises(proof.ProofFailed):
        proof.compare(sampling(LATENTS), sampling(LATENTS + 1.05 * allowed), base)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("restored", [{"a": "1", "b": "3"}, {"a": "1"}, {"a": "1", "b": "2", "c": "1"}])
def test_every_tensor_must_agree_on_every_device(device, restored):
    base = tiny_base()
    base.device = torch.device(device)
    trainers = sampling(LATENTS, a="1", b="2")
    assert proof.compare(trainers, sampling(LATENTS, b="2", a="1"), base)["equal_tensors"] == 2
    with pytest.raises(proof.ProofFailed, match=r"1 of \d tensors differ \([bc]\)"):
        proof.compare(trainers, sampling(LATENTS, **restored), base)


@pytest.mark.parametrize(
    "other", [torch.tensor([1.0, 0.0]).double(), torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, -0.0])]
)
def test_a_tensors_hash_depends_on_its_type_its_shape_and_every_bit(other):
    def hash_of(tensor: torch.Tensor) -> str:
        method: Any = torch.nn.ParameterDict({"learned": torch.nn.Parameter(tensor)})
        return proof.tensor_hashes(method)["learned"]

    assert hash_of(torch.tensor([1.0, 0.0])) == hash_of(torch.tensor([1.0, 0.0])) != hash_of(other)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_difference_that_is_not_a_number_proves_nothing(device):
    base, broken = tiny_base(), LATENTS.clone()
    base.device, broken[0, 0, 0, 0] = torch.device(device), float("nan")
    for one, other in ((LATENTS, broken), (broken, LATENTS), (broken, broken)):
        with pytest.raises(proof.ProofFailed):
            proof.compare(sampling(one), sampling(other), base)
