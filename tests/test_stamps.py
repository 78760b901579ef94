"""What Dagster shows as stale follows what results depend on: the settings of each method, and its sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalize_core import files, steps
from personalize_core.store import Store

WORKSPACE = Path(__file__).parents[1]  # the repository itself: its params.yaml and prompts, and the embedded base model
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
        ("methods/oft.py", {"recipe oft", "sampling oft"}),
        ("train.py", {f"recipe {method}" for method in METHODS}),
        ("models.py", {f"recipe {method}" for method in METHODS}),
        ("sample.py", {f"sampling {method}" for method in METHODS}),
        ("randomness.py", {"sampling core"}),  # a variant of it is refined at test time
        ("metrics/scoring.py", {"encoders"}),
        ("terminal.py", set()),
    ],
)
def test_an_edited_source_is_a_new_version_of_what_depends_on_it_and_of_nothing_else(source, changed, monkeypatch):
    before, plain = versions(), files.sha256
    edited = Path(files.__file__).parent / source
    assert edited.is_file()
    monkeypatch.setattr(files, "sha256", lambda path: plain(path) + "edited" * (path == edited))
    assert {name for name, version in versions().items() if version != before[name]} == changed
