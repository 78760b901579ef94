"""Workspaces of the tests' tiny models, made once and copied for each input."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import torch

from benchmarks.hostile_inputs.runner import finish
from personalize_core import steps
from personalize_core.artifacts import proof
from personalize_core.report import comparison
from personalize_core.report.figures import losses
from personalize_core.training import fixed_batch
from personalize_core.workspace.recipes import load_base
from personalize_core.workspace.store import Store
from tests import tiny_workspace
from tests.conftest import ThisProcess, quick_loss_curve, quick_scatter_plot

METHODS = ("base_model", "textual_inversion")
CONCEPT = "rex"


def shorten() -> None:
    """As for the tests: artifacts are checked in the same process, by fewer numbers, and nothing is plotted.

    One thread, because the forks of a process that has started more would wait for threads that they have not.
    """
    torch.set_num_threads(1)
    proof.FreshProcess = ThisProcess
    proof.STEPS, fixed_batch.TIMESTEPS = 1, (250, 750)
    losses.loss_curve, comparison.save_scatter_plot = quick_loss_curve, quick_scatter_plot


def plain(folder: Path) -> Path:
    """A workspace of one concept in which nothing has been made."""

    def make() -> None:
        store = tiny_workspace.make(folder)
        shutil.rmtree(store.concept_folder("cup"))
        tiny_workspace.write_params(folder, tiny_workspace.params_of(folder, METHODS))

    if not folder.exists():
        finish(make)
    return loaded(folder)


def finished(folder: Path) -> Path:
    """One in which all is made, compared and reported."""
    if not folder.exists():
        finish(lambda: chain(tiny_workspace.finished(folder, [CONCEPT], METHODS)))
    return loaded(folder)


def loaded(folder: Path) -> Path:
    """The same, with its base model in memory for all forks: to load it would be most of the time of each."""
    load_base(Store(folder))
    gc.freeze()  # a fork that collects garbage would copy what all of them share
    return folder


def chain(store: Store) -> None:
    """What `personalize run` does."""
    for method in METHODS:
        for step in (steps.train, steps.sample_grid, steps.score):
            step(store, CONCEPT, method)
    steps.score_references(store, CONCEPT)
    steps.compare(store)
    steps.report(store)


def copied(source: Path, folder: Path) -> Path:
    """The same workspace as the folder `workspace`; its models stay where they are."""
    tiny_workspace.copy_of(source, folder / "workspace")
    return folder / "workspace"
