"""Which scores are compared with which, where some of the images were made elsewhere."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats

from personalize_core.metrics import pairing, ranking, statistics, summaries, tables
from tests.metrics.test_tables import grid

CONCEPTS = [f"concept{number}" for number in range(5)]


def scores(seed):
    generator = np.random.default_rng(seed)
    return lambda *place: float(0.5 + 0.1 * generator.normal())


def external(variant, score, prompts=3, images=4, seeds=True, text=None, concepts=CONCEPTS):
    """An external column: its prompts in another order than ours, its seeds far from our image_index."""
    rows = grid(variant, score, concepts, prompts, images, source="another program")
    for row in rows:
        row["seed"] = 1000 + row["image_index"] if seeds else None
        row["prompt"] = text.format(row["prompt_index"], "{}") if text else row["prompt"]
        row["prompt_index"] = prompts - 1 - row["prompt_index"]
    return rows


def only(*columns, **options):
    return ranking.pairs(tables.from_rows([row for rows in columns for row in rows]), **options).row(0, named=True)


def ours(score, images=4):
    return grid("dreambooth", score, CONCEPTS, images=images)


def by_prompt(rows):
    """(concepts, prompts) means, without any code of the project."""
    concepts, prompts = (sorted({row[name] for row in rows}) for name in ("concept", "prompt"))
    return np.array(
        [
            [np.mean([r["score"] for r in rows if (r["concept"], r["prompt"]) == (c, p)]) for p in prompts]
            for c in concepts
        ]
    )


def test_an_external_column_is_compared_with_ours_prompt_by_prompt():
    one, other = ours(scores(0)), external("flux", scores(1), images=2)
    found = only(one, other)
    cells = by_prompt(one) - by_prompt(other)
    assert (found["pairing"], found["images"], found["unpaired"]) == ("prompt", 30, 0)
    assert found["difference"] == pytest.approx(cells.mean())
    concepts, prompts = (axis.ravel() for axis in np.indices(cells.shape))
    variance, _ = statistics.crossed_variance(concepts, prompts, cells.ravel(), cautious=True)
    assert found["error"] == pytest.approx(variance**0.5)


def test_two_external_columns_are_compared_seed_by_seed():
    one, other = external("flux", scores(0)), external("zimage", scores(1), images=3)
    found = only(one, other)
    common = [row for row in one if row["seed"] < 1003]
    assert (found["pairing"], found["images"], found["unpaired"]) == ("prompt and seed", 45, 15)
    assert found["difference"] == pytest.approx((by_prompt(common) - by_prompt(other)).mean())


@pytest.mark.parametrize("with_seeds", ["neither", "one"])
def test_external_columns_without_seeds_are_compared_prompt_by_prompt(with_seeds):
    found = only(external("a", scores(0), seeds=with_seeds == "one"), external("b", scores(1), seeds=False))
    assert found["pairing"] == "prompt"


def test_other_prompts_are_compared_concept_by_concept():
    one, other = ours(scores(0)), external("flux", scores(1), text="photo {} of {}", prompts=4)
    found = only(one, other)
    differences = by_prompt(one).mean(axis=1) - by_prompt(other).mean(axis=1)
    assert (found["pairing"], found["concepts"], found["unpaired"]) == ("unpaired", 5, 0)
    assert found["difference"] == pytest.approx(differences.mean())
    variance = differences.var(ddof=1) / 5
    for side in (by_prompt(one), by_prompt(other)):  # what the shared prompts add: B - E of the two-way table
        c, p = side.shape
        residuals = side - side.mean(axis=0) - side.mean(axis=1, keepdims=True) + side.mean()
        e = (residuals**2).sum() / ((c - 1) * (p - 1)) / (c * p)
        variance += max(side.mean(axis=0).var(ddof=1) / p - e, 0)
    assert found["error"] == pytest.approx(variance**0.5, rel=1e-6)


def test_a_few_common_prompts_are_not_taken_for_all():
    """One of four prompts is ours; the other images would be left out if only it were compared."""
    rows = external("flux", scores(1), text="photo {} of {}", prompts=4)
    same = ours(scores(0))[0]["prompt"]
    rows = [row | {"prompt": same} if row["prompt_index"] == 0 else row for row in rows]
    assert only(ours(scores(0)), rows)["pairing"] == "unpaired"


@pytest.mark.parametrize("seeds", [True, False])
def test_a_column_of_one_concept_is_paired_there_however_many_concepts_the_other_has(seeds):
    few = external("flux", scores(1), concepts=CONCEPTS[:1], seeds=seeds)
    found = only(ours(scores(0)), few)
    assert (found["pairing"], found["images"], found["concepts"], found["unpaired"]) == ("prompt", 12, 1, 48)
    mine = [row for row in ours(scores(0)) if row["concept"] == CONCEPTS[0]]
    assert found["difference"] == pytest.approx((by_prompt(mine) - by_prompt(few)).mean())
    other = only(external("zimage", scores(2)), few)
    assert other["pairing"] == ("prompt and seed" if seeds else "prompt")


def test_columns_of_other_concepts_cannot_be_told_apart():
    found = only(ours(scores(0)), external("flux", scores(1), concepts=["vase"]))
    assert (found["verdict"], found["difference"], found["unpaired"]) == ("undecided", None, 72)


def test_the_difference_from_the_baseline_is_paired_likewise_and_says_how():
    baseline = grid("base_model", scores(0), CONCEPTS)
    rows = external("flux", scores(1))
    table = tables.from_rows([*baseline, *rows, *ours(scores(2))])
    found = summaries.difference_from_baseline(table, draws=50)
    overall = {row["variant"]: row for row in found.filter(concept=tables.ALL_CONCEPTS).iter_rows(named=True)}
    assert {name: row["pairing"] for name, row in overall.items()} == {
        "flux": "prompt", "dreambooth": "prompt and noise"
    }  # fmt: skip
    assert overall["flux"]["difference"] == pytest.approx((by_prompt(rows) - by_prompt(baseline)).mean())
    other_floor = summaries.difference_from_baseline(table, baseline="flux", draws=50)
    assert set(other_floor["variant"]) == {"base_model", "dreambooth"}
    (turned,) = other_floor.filter(concept=tables.ALL_CONCEPTS, variant="base_model")["difference"]
    assert turned == pytest.approx(-overall["flux"]["difference"])


@pytest.mark.parametrize(("concepts", "prompts"), [(8, (5, 7)), (8, (4, 4)), (2, (6, 9)), (1, (8, 5))])
def test_unpaired_intervals_hold_in_95_of_100_tables(concepts, prompts):
    """Concepts differ, prompts differ and are shared by concepts, and the two go together in some way of their own."""
    held, tried = 0, 400
    for seed in range(tried):
        generator = np.random.default_rng(seed)
        of_concepts = generator.normal(size=(concepts, 1))  # the same on both sides
        sides: list[Any] = []
        for count in prompts:
            values = (
                of_concepts + 0.7 * generator.normal(size=(1, count)) + 0.5 * generator.normal(size=(concepts, count))
            )
            values = values + (0.3 * generator.normal(size=(concepts, 1)) if concepts > 2 else 0)
            sides.append((*(axis.ravel() for axis in np.indices(values.shape)), values.ravel()))
        found: Any = statistics.estimate_unpaired(*sides)
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / tried <= 0.99


def test_over_one_prompt_each_the_images_are_compared_as_welch_does():
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=6), generator.normal(size=9)
    none = [np.zeros(len(values), dtype=int) for values in (one, other)]
    found = statistics.estimate_unpaired((none[0], none[0], one), (none[1], none[1], other))
    welch = scipy.stats.ttest_ind(one, other, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((welch.low, welch.high))
    assert found.over == "images"


def test_of_two_images_nothing_but_the_difference_is_known():
    zero = np.zeros(1, dtype=int)
    found = statistics.estimate_unpaired((zero, zero, np.ones(1)), (zero, zero, np.zeros(1)))
    assert (found.mean, found.low) == (1.0, None)


def test_every_way_of_pairing_is_explained_in_the_tables():
    for way in (pairing.BY_NOISE, pairing.BY_SEED, pairing.BY_PROMPT, pairing.UNPAIRED):
        assert repr(way) in ranking.PAIR_COLUMNS["pairing"] and repr(way) in summaries.SUMMARY_COLUMNS["pairing"]
    assert pl.Series(ranking.pairs(tables.from_rows(ours(scores(0))))["pairing"]).dtype == pl.String
