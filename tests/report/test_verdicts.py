"""The words say what the ranking's verdicts say, and nothing that they do not."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from personalize_core.metrics import ranking
from personalize_core.metrics.concept_coverage import ConceptCoverage
from personalize_core.metrics.ranking import HIGHER, LOWER, UNDECIDED
from personalize_core.report import verdicts
from personalize_core.report.display_names import in_words

VARIANTS = ["base_model", "core", "dreambooth", "neti", "oft"]


def compared(told: dict[tuple[str, str], str], **more: Any) -> Any:
    """Evidence with these verdicts: (variant, other) -> verdict, one for every two."""
    metrics = {HIGHER: (0.2, 0.1, 0.3), LOWER: (-0.2, -0.3, -0.1), UNDECIDED: (0.0, -0.1, 0.1)}
    rows = [
        {"base_model": "mini", "metric": "dino", "encoder": "e", "variant": one, "other": other, "verdict": said}
        | dict(zip(("difference", "low", "high"), metrics[said], strict=True))
        | {
            "pairing": "prompt and noise",
            "comparisons": len(told),
            "over": "prompts",
            "training_noise": None,
            "concepts": 2,
        }
        | more
        for (one, other), said in told.items()
    ]
    names = sorted({name for pair in told for name in pair})
    summary = pl.DataFrame(
        [
            {"base_model": "mini", "metric": "dino", "encoder": "e", "method": name, "variant": name,
             "mean": 1 - 0.1 * place, "concept": "all concepts", "headline": True, "concepts": 2}
            for place, name in enumerate(names)
        ]
    )  # fmt: skip
    pairs = pl.DataFrame(rows, schema_overrides={"training_noise": pl.Float64})
    ranked = ranking.rank(pairs, summary)
    return SimpleNamespace(
        pairs=pairs, rank=ranked, variants=names, metrics=["dino"], base_model="mini", concepts=[1, 2],
        baseline="base_model",
        coverage=ConceptCoverage.of_summary(summary, ["dino"]),
    )  # fmt: skip


def test_one_is_said_to_be_best_exactly_if_it_is_told_above_every_other():
    """200 tables of verdicts drawn at random, also such as no order gives (A above B, B above C, A and C open)."""
    generator, answers = np.random.default_rng(0), set()
    for _ in range(200):
        said = generator.choice([HIGHER, LOWER, UNDECIDED], size=10, p=[0.6, 0.1, 0.3])
        told = dict(zip(itertools.combinations(VARIANTS, 2), map(str, said), strict=True))
        above = {(one, other) for (one, other), v in told.items() if v == HIGHER}
        above |= {(other, one) for (one, other), v in told.items() if v == LOWER}
        best = [one for one in VARIANTS if all((one, other) in above for other in VARIANTS if other != one)]
        found = verdicts.verdicts(compared(told))[0]
        assert found.told == bool(best)
        assert found.answer == (in_words(best[0]) if best else UNDECIDED)
        answers.add(found.answer)
        against = " ".join(found.sentences).split("learned nothing: ")[1].rstrip(".")
        of_baseline = dict(part.split(": ") for part in against.split("; "))
        words = {"above it": [], "undecided": [], "below it": []}
        for name in VARIANTS[1:]:
            way = "above it" if (name, "base_model") in above else "undecided"
            words["below it" if ("base_model", name) in above else way].append(name)
        expected = {way: [in_words(name) for name in names] for way, names in words.items() if names}
        assert {way: names.replace(" and ", ", ").split(", ") for way, names in of_baseline.items()} == expected
    assert {UNDECIDED, "base model"} <= answers


def test_many_on_one_side_of_the_base_model_are_counted_and_the_others_named():
    names = ["base_model", *(f"m{i}" for i in range(7))]
    told = dict.fromkeys(itertools.combinations(names, 2), UNDECIDED)
    told |= {("base_model", name): LOWER for name in names[1:6]}
    said = verdicts.verdicts(compared(told))[0].sentences[1]
    assert said.endswith("learned nothing: undecided: m5 and m6; above it: all 5 others.")


def test_where_nothing_can_be_told_nothing_else_is_said():
    found = verdicts.verdicts(compared(dict.fromkeys(itertools.combinations(VARIANTS, 2), UNDECIDED)))[0]
    assert (found.told, found.answer) == (False, "undecided")
    assert found.sentences[0] == "No two of the 5 variants can be told apart at 95 %."


def test_the_best_is_told_with_its_distance_from_the_nearest():
    told = {("base_model", "dreambooth"): LOWER, ("base_model", "oft"): UNDECIDED, ("dreambooth", "oft"): HIGHER}
    found = verdicts.verdicts(compared(told))[0]
    said = "DreamBooth is above each of the 2 others at 95 %; above base model, the nearest, by 0.200 [0.100, 0.300]."
    assert found.sentences[0] == said


def test_several_that_may_be_best_are_named_and_the_others_are_below_something():
    told = {("base_model", "dreambooth"): LOWER, ("base_model", "oft"): LOWER, ("dreambooth", "oft"): UNDECIDED}
    first = verdicts.verdicts(compared(told))[0].sentences[0]
    assert first == (
        "The best may be any of DreamBooth and OFT: no two of these can be told apart at 95 %. Below some variant: "
        "base model."
    )


def test_where_many_may_be_best_they_are_counted_and_those_that_are_not_are_named():
    names = [f"m{i}" for i in range(9)]
    told = dict.fromkeys(itertools.combinations(names, 2), UNDECIDED) | {("m0", "m8"): HIGHER, ("m0", "m7"): HIGHER}
    first = verdicts.verdicts(compared(told))[0].sentences[0]
    assert first.startswith("The best may be any of 7 of the 9 variants: ") and first.endswith("variant: m7 and m8.")
    told |= {("m0", name): HIGHER for name in names[2:]}
    first = verdicts.verdicts(compared(told))[0].sentences[0]
    assert first.startswith("The best may be any of m0 and m1: ") and first.endswith(
        "Below some variant: all 7 others."
    )


def test_two_are_told_from_either_side():
    evidence = compared({("base_model", "oft"): LOWER})
    turned = verdicts.between(evidence, "dino", "oft", "base_model")
    assert turned and (turned["verdict"], turned["difference"]) == (HIGHER, 0.2)
    assert (turned["low"], turned["high"]) == (0.1, 0.3)


def test_what_the_verdicts_are_not_over_is_said():
    told = {("base_model", "oft"): UNDECIDED}
    alone = " ".join(verdicts.notes(compared(told)))
    assert "about these concepts alone" in alone and "another seed would change is not measured" in alone
    wide = " ".join(verdicts.notes(compared(told, over="concepts and prompts", training_noise=0.01)))
    assert "alone" not in wide and "not measured" not in wide and "counted in" in wide
    assert "no verdict is possible" in " ".join(verdicts.notes(compared(told, over=None)))


@pytest.mark.parametrize(("base_model", "warned"), [("mini", True), ("sd-1.4", False)])
def test_the_miniature_is_no_evidence_about_stable_diffusion(base_model, warned):
    evidence = compared({("base_model", "oft"): UNDECIDED})
    evidence.base_model = base_model
    assert ("no evidence about Stable Diffusion" in verdicts.caution(evidence)) == warned


def test_ways_to_compare_other_than_by_noise_are_counted_for_whichever_score_has_them():
    told = {("core", "flux"): UNDECIDED, ("core", "oft"): HIGHER}
    evidence = compared(told)
    assert "How pairs" not in " ".join(verdicts.notes(evidence))
    text = compared({("core", "flux"): UNDECIDED}, metric="clip_t", pairing="prompt")
    evidence.pairs, evidence.metrics = pl.concat([evidence.pairs, text.pairs]), ["dino", "clip_t"]
    (sentence,) = [note for note in verdicts.notes(evidence) if "How pairs" in note]
    assert "2 by images of the same prompt and noise" in sentence
    assert "1 by the means of prompts that both have" in sentence
