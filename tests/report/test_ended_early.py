"""What a report says of trainings that ended when enough was learned."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from personalize_core import steps
from personalize_core.files.atomic import write_json
from personalize_core.metrics import ended_early as measured
from personalize_core.metrics import parquet, statistics
from personalize_core.metrics.ended_early import TOGETHER, EndedEarly
from personalize_core.report import evidence as read_evidence
from personalize_core.report.ended_early import ended_early
from personalize_core.steps.probe_record import MEANINGS, SCHEMA
from personalize_core.training.probe_files import ENDED, PROBES
from personalize_core.workspace.store import SCORES, Store
from tests.report import workspace

METHODS = ("dreambooth", "textual_inversion")
TAKEN = {"dreambooth": {"rex": 10, "cup": 30}, "textual_inversion": {"rex": 40, "cup": 40}}  # of 40
LEVELS = {
    "base_model": (0.20, 0.310),
    "dreambooth": (0.70, 0.300),
    "dreambooth@adaptive": (0.50, 0.300),
    "textual_inversion": (0.40, 0.305),
    "textual_inversion@adaptive": (0.40, 0.305),
}
BY_BALANCE = {"stop": "probes", "keep": "best", "by": "balance"}


def ends(store: Store, method: str, concept: str, taken: int, how: dict) -> None:
    """Say of an artifact that it was trained adaptively; the best of its three probes is the second."""
    folder = store.artifact(method, concept)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"config": config["config"] | {"adaptive": how}})
    kept = taken // 2 if how.get("keep") == "best" else taken
    stage = {"steps": taken, "of": 40, "learned": taken < 40, "kept": kept}
    write_json(folder / ENDED, {"steps": taken, "of": 40, "stages": {"all": stage}})
    about = {"stage": "all", "prompt": "a dog"}
    values = {0: (0.1, 0.2), taken // 2: (0.7, 0.5), taken: (0.3, 0.5)}
    rows = [
        about | {"step": step, "done": step, "row": row, "metric": metric, "value": value * share}
        for metric, share in (("identity", 1), ("text", 0.5))
        for step, pair in values.items()
        for row, value in enumerate(pair)
    ]
    parquet.write_parquet(pl.DataFrame(rows, schema=SCHEMA), folder / PROBES, MEANINGS)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Store:
    store = workspace.make(tmp_path_factory.mktemp("early") / "workspace", LEVELS)
    for method in METHODS:
        for concept in workspace.CONCEPTS:
            how = BY_BALANCE if method == "dreambooth" else {"stop": "loss", "keep": "last"}
            ends(store, f"{method}@adaptive", concept, TAKEN[method][concept], how)
    steps.compare(store)
    steps.report(store)
    return store


@pytest.fixture(scope="module")
def frame(made: Store) -> pl.DataFrame:
    return pl.read_parquet(made.report() / "tables" / "ended_early.parquet")


def row_of(frame: pl.DataFrame, variant: str, metric: str) -> dict:
    return frame.filter(variant=variant, metric=metric).row(0, named=True)


def test_steps_are_a_mean_over_concepts_and_a_share_is_saved(frame):
    row = row_of(frame, "dreambooth@adaptive", "dino")
    assert (row["trainings"], row["steps"], row["steps_from"], row["steps_to"]) == (2, 20, 10, 30)
    assert (row["allowed"], row["saved"], row["fixed"]) == (40, 0.5, "dreambooth")
    assert row_of(frame, "textual_inversion@adaptive", "dino")["saved"] == 0
    assert row_of(frame, TOGETHER, "dino")["saved"] == 0.25


def by_hand(made: Store, variants: tuple[str, str], value) -> np.ndarray:
    """(images,) differences of `value`(identity, text), in the order of concepts, prompts and images."""
    sides = []
    for variant in variants:
        found = []
        for concept in sorted(workspace.CONCEPTS):
            table = pl.read_parquet(made.scores(variant, concept) / SCORES).sort("prompt_index", "image_index")
            identity, text = (table.filter(metric=metric)["score"].to_numpy() for metric in ("dino", "clip_t"))
            found.append(value(identity, text))
        sides.append(np.concatenate(found))
    return sides[0] - sides[1]


VALUES = {
    "dino": lambda identity, text: identity,
    "clip_t": lambda identity, text: text,
    "balance": lambda identity, text: np.sqrt(identity * text),
}


def interval_of(differences: np.ndarray) -> statistics.Estimate:
    concepts, prompts = np.repeat([0, 1], 8), np.tile(np.repeat(range(4), 2), 2)
    return statistics.estimate(concepts, prompts, differences)


@pytest.mark.parametrize("metric", VALUES)
@pytest.mark.parametrize("method", METHODS)
def test_a_difference_is_that_of_the_same_images_with_the_interval_of_their_differences(made, frame, method, metric):
    found = row_of(frame, f"{method}@adaptive", metric)
    expected = interval_of(by_hand(made, (f"{method}@adaptive", method), VALUES[metric]))
    for name, value in (("difference", expected.mean), ("low", expected.low), ("high", expected.high)):
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert expected.low is not None and expected.high is not None
    said = "higher" if expected.low > 0 else "lower" if expected.high < 0 else "undecided"
    assert found["verdict"] == said and (found["images"], found["concepts"]) == (16, 2)


def test_both_verdicts_are_met(frame):
    said = {metric: row_of(frame, "dreambooth@adaptive", metric)["verdict"] for metric in VALUES}
    assert said == {"dino": "lower", "clip_t": "undecided", "balance": "lower"}


def test_all_together_is_the_mean_over_methods_at_each_image(made, frame):
    each = [by_hand(made, (f"{method}@adaptive", method), VALUES["dino"]) for method in METHODS]
    expected, found = interval_of((each[0] + each[1]) / 2), row_of(frame, TOGETHER, "dino")
    for name, value in (("difference", expected.mean), ("low", expected.low), ("high", expected.high)):
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_all_together_is_over_the_images_that_all_have(made):
    told = read_evidence.read(made)
    lacking = told.scores.filter(~((pl.col("variant") == "textual_inversion") & (pl.col("concept") == "cup")))
    columns = [EndedEarly(f"{method}@adaptive", method, {"rex": (1, 2)}) for method in METHODS]
    found = measured.what_it_changed(lacking, columns, ["dino"])
    assert row_of(found, "dreambooth@adaptive", "dino")["concepts"] == 2
    assert row_of(found, "textual_inversion@adaptive", "dino")["concepts"] == 1
    together = row_of(found, TOGETHER, "dino")
    each = [by_hand(made, (f"{method}@adaptive", method), VALUES["dino"])[8:] for method in METHODS]  # of rex
    assert together["concepts"] == 1 and together["difference"] == pytest.approx(np.mean(each))


def test_the_page_says_how_much_was_saved_what_it_did_and_which_probe_was_kept(made):
    html = (made.report() / "report.html").read_text()
    section = html[html.index('id="ended-early"') : html.index('id="table-verdicts"')]
    assert "25 % of the steps were saved; DINO: 1 lower, 1 undecided; CLIP-T: 2 undecided;" in section
    assert ">20 (10 to 30)<" in section and ">50 %<" in section
    assert ">best by balance: steps 5 to 15<" in section and ">last step<" in section and "All together" in section
    assert "balance (the geometric mean of identity, with the images held out, and text alignment)" in section
    assert 'class="unsure">undecided' in section
    method = html[html.index('id="method-dreambooth@adaptive"') :]
    assert "all: 30 of 40 steps, kept as it was at step 15" in method
    assert "of the 3 probes of all that of step 15 was kept, the best by balance, the geometric mean" in method
    assert "identity 0.600, text 0.300 (identity 0.400, text 0.200 at step 30, the last)" in method


def test_without_the_same_recipe_there_is_nothing_to_compare_with(made, tmp_path):
    """Neither by another recipe of the method, nor where there are fixed trainings of none."""
    levels = {name: level for name, level in LEVELS.items() if "textual" not in name}
    store = workspace.make(tmp_path / "workspace", levels)
    ends(store, "dreambooth@adaptive", "rex", 10, BY_BALANCE)
    ends(store, "dreambooth@adaptive", "cup", 10, BY_BALANCE)
    path = store.artifact("dreambooth", "rex") / "config.json"
    config = json.loads(path.read_text())
    write_json(path, config | {"config": config["config"] | {"steps": 80}})
    steps.compare(store)
    table = ended_early(read_evidence.read(store))
    assert table.frame["fixed"].null_count() == table.frame["difference"].null_count() == len(table.frame) == 3
    assert table.shown[1][4:10] == ["-", "-"] * 3 and len(table.shown) == 2


def test_where_nothing_may_end_early_there_is_no_table(tmp_path):
    store = workspace.make(tmp_path / "workspace")
    steps.compare(store)
    assert "ended-early" not in steps.report(store).path.read_text()
