"""Published scores stand beside ours only under the same contract."""

from __future__ import annotations

from dataclasses import replace

import pytest

from personalize_core.report import published
from personalize_core.report.published import Ours

PAPER = "Personalized Residuals (arXiv 2405.12978)"
OURS = Ours(
    base_model="sd-1.4",
    protocol="personalized_residuals",
    concepts=101,
    prompts=20,
    images_per_prompt=50,
    means={
        ("dreambooth", "dino", "dino-s16"): (0.52, 0.5, 0.54),
        ("dreambooth", "clip_i", "clip-b32"): (0.74, None, None),
        ("dreambooth", "clip_t_scaled", "clip-b32"): (0.75, 0.7, 0.8),
    },
)


def in_table_1(rows):
    return {(row.method, row.metric): row for row in rows if (row.paper, row.table) == (PAPER, "Table 1")}


def test_under_the_same_contract_ours_stands_beside_theirs():
    found = in_table_1(published.beside(OURS))
    row = found["DreamBooth", "DINO_image"]
    assert (row.value, row.differs, row.mean, row.low, row.high) == ("0.5212", [], 0.52, 0.5, 0.54)
    assert found["DreamBooth", "CLIP_text"].mean == 0.75, "on the published scale, times 2.5"
    assert found["ViCo", "DINO_image"].mean is None, "a method that we have not scored"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_model": "mini"}, "base model: sd-1.4 there, mini here"),
        ({"protocol": None}, "protocol: personalized_residuals there, none here"),
        ({"concepts": 8}, "concepts: 101 there, 8 here"),
        ({"prompts": 5}, "prompts: 20 there, 5 here"),
        ({"images_per_prompt": 4}, "images of a prompt: 50 there, 4 here"),
        ({"means": {("dreambooth", "dino", "mini-identity"): (0.5, None, None)}}, "dino-s16 there, mini-identity here"),
    ],
)
def test_a_contract_that_differs_in_one_thing_keeps_the_numbers_apart_and_says_in_what(change, said):
    row = in_table_1(published.beside(replace(OURS, **change)))["DreamBooth", "DINO_image"]
    assert row.mean is None and len(row.differs) == 1 and said in row.differs[0]


def test_what_a_paper_does_not_state_never_matches():
    rows = [row for row in published.beside(OURS) if row.paper.startswith("CoRe")]
    assert rows and all(any("not stated there" in one for one in row.differs) for row in rows)


def test_nothing_of_the_miniature_matches():
    mini = Ours("mini", "mini", 8, 16, 4, {("core", "dino", "mini-identity"): (0.5, None, None)})
    rows = published.beside(mini)
    assert rows and all(row.differs and row.mean is None for row in rows)


def test_every_published_likeness_to_concept_or_text_has_a_contract():
    scores = {"CLIP_text", "CLIP_image", "DINO_image", "CLIP_T", "CLIP_I", "DINO", "CLIP_I_masked", "DINO_masked"}
    alone = {"Two concepts, 200 DDPM steps", "Two concepts, 50 DDPM steps"}  # we sample no benchmark of pairs
    rows = [row for row in published.results().iter_rows(named=True) if row["metric"] in scores]
    known = {(row.paper, row.table, row.method, row.metric) for row in published.beside(OURS)}
    lacking = {(row["paper"], row["table"], row["method"], row["metric"]) for row in rows} - known
    assert {table for _, table, _, _ in lacking} == alone


def test_each_contract_is_of_tables_that_are_there():
    tables = set(published.results().select("paper", "table").unique().rows())
    for contract in published.contracts():
        for name in contract["tables"]:
            assert any(paper == contract["paper"] and table.startswith(name) for paper, table in tables)
