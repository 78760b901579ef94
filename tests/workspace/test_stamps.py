"""What Dagster shows as stale follows what results depend on: the settings of each method, and its sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalize_core import steps
from personalize_core.files import stamps
from personalize_core.methods import METHOD_NAMES, method_source
from personalize_core.workspace.stamps import sources
from personalize_core.workspace.store import Store
from tests.imports import imported

WORKSPACE = Path(__file__).parents[2]  # the repository itself: its params.yaml and prompts, and the embedded base model
METHODS = ("textual_inversion", "oft", "core")


def versions() -> dict[str, str]:
    store = Store(WORKSPACE)
    return {
        **{f"recipe {method}": steps.recipe_stamp(store, method) for method in METHODS},
        **{f"sampling {method}": steps.sampling_stamp(store, method) for method in METHODS},
        "encoders": steps.scoring_stamp(store),
    }


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("methods/oft/method.py", {"recipe oft", "sampling oft"}),
        ("methods/oft/recipe.py", set()),
        ("training/loop.py", {f"recipe {method}" for method in METHODS}),
        ("base_model/loading.py", {f"recipe {method}" for method in METHODS}),
        ("base_model/pretrained.py", {f"recipe {method}" for method in METHODS}),
        ("sampling/sampler.py", {f"sampling {method}" for method in METHODS}),
        ("randomness.py", {"sampling core"}),  # a variant of it is refined at test time
        ("metrics/scoring.py", {"encoders"}),
        ("metrics/features.py", {"encoders"}),
        ("cli/terminal.py", set()),
    ],
)
def test_an_edited_source_is_a_new_version_of_what_depends_on_it_and_of_nothing_else(source, changed, monkeypatch):
    before, plain = versions(), stamps.sha256
    edited = Path(stamps.__file__).parents[1] / source
    assert edited.is_file()
    monkeypatch.setattr(stamps, "sha256", lambda path: plain(path) + "edited" * (path == edited))
    assert {name for name, version in versions().items() if version != before[name]} == changed


# What decides nothing of what is learned or sampled: other programs' files, and options, whose values the stamps name.
OF_FILES_AND_OPTIONS = {
    "methods/shared/attention_processors",
    "methods/shared/interchange",
    "methods/shared/lora_files",
    "methods/shared/options",
}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_an_artifact_depends_on_all_that_its_method_is_made_of(method):
    made_of = imported(method_source(method), "methods/shared/") - OF_FILES_AND_OPTIONS
    assert made_of <= {*sources.TRAINING}
    assert made_of <= {*sources.SAMPLING, *sources.REFINING}
