"""The setting `deterministic` of params.yaml chooses torch's kernels, for this process and for the one that checks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from personalize_core import steps
from personalize_core.artifacts import proof
from personalize_core.base_model.determinism import FIXED, WORKSPACE, set_deterministic
from personalize_core.workspace.recipes import load_base
from tests import tiny_workspace
from tests.conftest import tiny_base

FreshProcess = proof.FreshProcess  # before conftest's fixture replaces it


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(WORKSPACE, "")  # so that it is restored
    monkeypatch.delenv(WORKSPACE)
    yield
    set_deterministic(False)


@pytest.mark.parametrize("on", [True, False])
def test_loading_the_base_model_chooses_the_kernels(on, tmp_path):
    store = tiny_workspace.make(tmp_path)
    set_deterministic(not on)
    os.environ.pop(WORKSPACE, None)
    load_base(tiny_workspace.write_params(store.root, tiny_workspace.params(store.root) | {"deterministic": on}))
    assert torch.are_deterministic_algorithms_enabled() == on
    assert os.environ.get(WORKSPACE) == (FIXED if on else None)
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is not on
    on_cpu: Any = torch.backends.mkldnn
    assert on_cpu.matmul.fp32_precision == "none"  # as it was


def test_a_workspace_of_cublas_that_the_user_set_stays(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    set_deterministic(True)
    assert os.environ[WORKSPACE] == ":16:8"


def test_the_checking_process_uses_the_same_kernels(tmp_path, monkeypatch):
    def evidence(*of: object) -> proof.Evidence:
        return proof.Evidence(torch.zeros(1), {"deterministic": str(torch.are_deterministic_algorithms_enabled())})

    monkeypatch.setattr(proof, "load_base_model", lambda *of: None)
    monkeypatch.setattr(proof, "restore", lambda *of: None)
    monkeypatch.setattr(proof, "evidence", evidence)
    monkeypatch.setattr(proof._Reader, "tell", lambda reader, fork, **what: proof._draw(**what))
    monkeypatch.setattr(proof._Reader, "heard", lambda reader: (0, ""))
    for on in (True, False):
        set_deterministic(on)
        with FreshProcess(tiny_base()) as fresh:
            fresh.restore(tmp_path)
            assert fresh.evidence().hashes == {"deterministic": str(on)}


@pytest.mark.slow
def test_on_a_cpu_training_and_its_check_give_the_same_bytes_either_way(tmp_path):
    made, root = [], tiny_workspace.make(tmp_path).root
    for on in (False, True):
        store = tiny_workspace.write_params(root, tiny_workspace.params(root) | {"deterministic": on})
        folder = steps.train(store, "rex", "textual_inversion").path
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
        shutil.rmtree(folder)
    assert made[0] == made[1]
