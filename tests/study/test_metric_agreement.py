"""How well metrics predict people: every number against another library, a published example, or plain counting."""

from __future__ import annotations

import itertools
import json

import numpy as np
import polars as pl
import pytest
import scipy.stats

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.metrics import tables
from personalize_core.report.figures.agreement import RATERS
from personalize_core.study import metric_agreement as ours
from personalize_core.study import page
from personalize_core.study.alpha import krippendorff_alpha, nominal_alpha
from personalize_core.study.design import Request, design
from personalize_core.workspace.store import AGREEMENT, SCORES
from tests.report import workspace
from tests.study import workspace as small

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: four observers, twelve units.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def random_answers(seed: int, raters=9, pairs=14, concepts=4, share=0.6) -> ours.Answers:
    """Not every rater saw every pair, and some are not sure."""
    generator = np.random.default_rng(seed)
    seen = np.argwhere(generator.random((raters, pairs)) < share)
    first = generator.choice([0.0, 1.0, 0.5], size=len(seen), p=[0.35, 0.45, 0.2])
    return ours.Answers(seen[:, 1], seen[:, 0], first, np.arange(pairs) % concepts)


def test_alpha_is_that_of_krippendorffs_worked_example_also_with_weights():
    counts = np.array([[sum(rating == value for rating in unit) for value in range(1, 6)] for unit in zip(*OBSERVERS)])  # noqa: B905
    for times in (1, 3):  # three of every unit: another n - 1, and nothing else
        weights = np.tile(counts, (times, 1)).astype(float)
        same, both = (weights**2 - weights).sum(axis=1), weights.sum(axis=1) ** 2 - weights.sum(axis=1)
        found = nominal_alpha(same, both, weights)
        assert found == pytest.approx(krippendorff_alpha(np.tile(counts, (times, 1))))
        if times == 1:
            assert found == pytest.approx(0.743, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlations_are_scipys_and_weights_are_repetitions(seed):
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, 6, 25).astype(float), generator.integers(0, 4, 25).astype(float)
    for weights in (np.ones(25), generator.integers(0, 4, 25).astype(float)):
        a, b = (np.repeat(values, weights.astype(int)) for values in (x, y))
        assert ours.spearman(x, y, weights) == pytest.approx(scipy.stats.spearmanr(a, b)[0])
        assert ours.kendall(x, y, weights) == pytest.approx(scipy.stats.kendalltau(a, b)[0])


def test_where_nothing_varies_there_is_no_correlation():
    ones = np.ones(4)
    assert ours.spearman(ones, np.arange(4.0), ones) is None and ours.kendall(np.arange(4.0), ones, ones) is None
    assert ours.kendall(np.arange(4.0), np.arange(4.0), np.zeros(4)) is None


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_preference_and_agreement_are_counted_one_by_one(seed):
    answers, generator = random_answers(seed), np.random.default_rng(seed)
    difference = generator.choice([-0.2, 0.0, 0.3], size=len(answers.concept))
    every = list(zip(answers.pair, answers.rater, answers.first, strict=True))
    right = [
        0.5 if difference[pair] == 0 else float((difference[pair] > 0) == (first == 1))
        for pair, _, first in every
        if first != 0.5
    ]
    weights = np.ones(len(every))
    assert ours.accuracy(answers, difference, weights) == pytest.approx(np.mean(right))
    preferred = ours.preference(answers, weights)
    for pair in range(len(answers.concept)):
        assert preferred[pair] == pytest.approx(np.mean([f for p, _, f in every if p == pair] or [0.0]))
    twos = [
        one[2] == other[2]
        for one, other in itertools.combinations([each for each in every if each[2] != 0.5], 2)
        if one[0] == other[0]
    ]
    assert ours.agreeing(answers, weights) == pytest.approx(np.mean(twos))


def test_a_rater_who_is_drawn_twice_does_not_agree_with_himself():
    answers = ours.Answers(np.zeros(2, int), np.arange(2), np.array([1.0, 0.0]), np.zeros(1, int))
    assert ours.agreeing(answers, np.array([5.0, 5.0])) == 0.0
    assert ours.agreeing(answers, np.array([5.0, 0.0])) is None


def test_an_interval_draws_raters_and_concepts_and_holds_the_truth_in_most_studies():
    """Raters have a chance of 0.7 to choose as the metric says, each a chance of his own around it."""
    held, tried = 0, 60
    for seed in range(tried):
        generator = np.random.default_rng(seed)
        chance = generator.beta(14, 6, size=20)
        pairs = 24
        seen = np.array(list(itertools.product(range(20), range(pairs))))
        right = generator.random(len(seen)) < chance[seen[:, 0]]
        difference = generator.choice([-1.0, 1.0], size=pairs)
        first = np.where(right, difference[seen[:, 1]] > 0, difference[seen[:, 1]] < 0).astype(float)
        answers = ours.Answers(seen[:, 1], seen[:, 0], first, np.arange(pairs) % 12)
        drawn = [ours.accuracy(answers, difference, each.answers) for each in ours.resample(answers, 200, seed)]
        low, high = np.quantile(np.array(drawn, dtype=float), [0.025, 0.975])
        held += low <= 0.7 <= high
    assert held / tried >= 0.88


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of three variants, answered as DINO would: the image with the higher score is preferred."""
    store = workspace.make(tmp_path_factory.mktemp("study") / "workspace")
    key = design(store, Request(variants=["dreambooth", "textual_inversion", "base_model"], pairs=8, per_rater=32))
    folder = store.root / "answers"
    folder.mkdir()
    (folder / page.KEY).write_text(key.model_dump_json())
    scores = {
        (row["variant"], row["concept"], row["prompt_index"], row["image_index"]): row["score"]
        for method in workspace.LEVELS
        for concept in workspace.CONCEPTS
        for row in tables.read(store.scores(method, concept) / SCORES).filter(metric="dino").iter_rows(named=True)
    }
    for rater in range(5):
        given = []
        for number, (one, other) in enumerate(key.pairs()):
            sides = []
            for index in (one, other):
                cell = key.cells[key.images[index].cell]
                place = (key.concepts[cell.concept].name, cell.prompt_index, cell.image_index)
                sides.append(scores[(key.images[index].variant, *place)])
            given.append(("image", number, True, "left" if sides[0] > sides[1] else "right"))
        (folder / f"rater_{rater}.json").write_text(json.dumps(small.answers(key, f"{rater:016x}", given)))
    return store, folder


def test_a_metric_that_people_follow_predicts_all_their_answers(study):
    store, folder = study
    report = steps.study_agreement(store, [folder])
    found = pl.read_parquet(report.path / AGREEMENT)
    rows = {row["metric"]: row for row in found.filter(question="image", headline=True).iter_rows(named=True)}
    assert rows["dino"]["accuracy"] == 1.0 and rows["dino"]["unscored"] == 0
    assert rows["clip_t"]["accuracy"] < 1.0
    (raters,) = found.filter(metric=RATERS).iter_rows(named=True)
    assert raters["accuracy"] == 1.0 and raters["raters"] == 5 and raters["concepts"] == 2
    assert set(found.columns) == set(ours.COLUMNS)
    link = steps.explain(store, report.path)
    assert (link.what, link.facts["raters"], link.problems) == ("agreement with people", 5, [])
    assert report.images["agreement"].is_file() and steps.study_agreement(store, [folder]).skipped
    steps.compare(store)
    text = steps.report(store).path.read_text()
    assert "Agreement with people" in text and "No human study was made" not in text


def test_scores_of_other_images_than_raters_saw_do_not_count():
    """A pair counts for a metric where both images are the very files that raters saw."""
    place = {"concept": "rex", "text": "a photo of a dog"}
    pair = {"pair": 3, **place, "first": "a", "second": "b", "first_sha256": "1", "second_sha256": "2"}
    rows = [
        {"metric": "dino", "encoder": "e", "headline": True, "variant": variant, **place}
        | {"image_sha256": digest, "score": score}
        for variant, digest, score in (("a", "1", 0.25), ("b", "2", 0.75), ("b", "2", 0.75))  # the same image twice
    ]
    found = ours.scores_of_pairs(pl.DataFrame([pair]), [pl.DataFrame(rows)])
    assert found.rows(named=True) == [
        {"metric": "dino", "encoder": "e", "headline": True, "pair": 3, "first": 0.25, "second": 0.75}
    ]
    assert ours.scores_of_pairs(pl.DataFrame([pair | {"second_sha256": "9"}]), [pl.DataFrame(rows)]).is_empty()


def test_without_answers_it_says_what_to_name(study, tmp_path):
    store, folder = study
    (tmp_path / page.KEY).write_text((folder / page.KEY).read_text())
    for given in ([], [tmp_path]):
        with pytest.raises(InputError, match="no file of answers"):
            steps.study_agreement(store, given)
