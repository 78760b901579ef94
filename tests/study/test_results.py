"""What a study says: damaged answers are refused, and every number against a computation that shares no code."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import bootstrap

from personalize_core.cli import main as command_line
from personalize_core.errors import InputError
from personalize_core.study import answers as answer_files
from personalize_core.study import results
from personalize_core.study.alpha import krippendorff_alpha
from personalize_core.study.design import Cell, Comparison, ConceptShown, Key, StudyImage
from tests.study import workspace as small

CELLS = 12
OURS, OTHERS = small.VARIANTS[0], small.VARIANTS[1:]


def make_key(questions: list, each: int = 4, seed: int = 0) -> Key:
    """A study of two comparisons over twelve cells, without any image."""
    images = [StudyImage(variant=v, cell=cell, sha256="0" * 64) for cell in range(CELLS) for v in small.VARIANTS]
    order = np.random.default_rng(seed).permutation(len(images))
    return Key.of(
        title="A study",
        base_model="tiny",
        questions=questions,
        comparisons=[Comparison(first=OURS, second=other) for other in OTHERS],
        concepts=[ConceptShown(name="rex", class_noun="dog", concept_images=["0.png"])],
        left_out=[],
        cells=[Cell(concept=0, prompt_index=i, image_index=0, text=f"a dog {i}") for i in range(CELLS)],
        images=[images[index] for index in order],
        each=each,
        seed=seed,
    )


PAPERS, FORCED = make_key(["text", "image"]), make_key(["both"])


def one_rater(key: Key, number: int, sure: float = 0.75) -> dict:
    """Answers drawn at random: every rater has a taste of their own for the first variant."""
    generator = np.random.default_rng([7, number])
    taste, given = generator.beta(4, 3), []
    for comparison in range(len(key.comparisons)):
        pairs = generator.permutation(CELLS)[: key.each * len(key.questions)] + comparison * CELLS
        for place, pair in enumerate(pairs):
            question = key.questions[place % len(key.questions)]
            first_left, prefers_first = bool(generator.random() < 0.5), bool(generator.random() < taste)
            answer = "left" if first_left == prefers_first else "right"
            if question != "both" and generator.random() > sure:
                answer = "not_sure"
            given.append((question, int(pair), first_left, answer))
    return small.answers(key, f"{number:016x}", given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fourteen raters' files beside the key."""
    (tmp_path / "study_key.json").write_text(PAPERS.model_dump_json())
    for number in range(14):
        (tmp_path / f"rater_{number}.json").write_text(json.dumps(one_rater(PAPERS, number)))
    return tmp_path


def read(folder: Path, key: Key = PAPERS):
    return answer_files.read(sorted(folder.glob("rater_*.json")), key)


def evaluated(key: Key, raters: list[dict], tmp_path: Path, **options) -> results.Results:
    for number, values in enumerate(raters):
        (tmp_path / f"rater_{number}.json").write_text(json.dumps(values))
    return results.evaluate(key, *read(tmp_path, key), **options)


def raw(folder: Path) -> list[tuple[str, str, str, int, str]]:
    """(rater, question, other variant, pair, preference), read from the files by hand and the key alone."""
    rows = []
    for path in sorted(folder.glob("rater_*.json")):
        values = json.loads(path.read_text())
        for given in values["answers"]:
            variants = {side: PAPERS.images[given[side]].variant for side in ("left", "right")}
            other = next(variant for variant in variants.values() if variant != OURS)
            chosen = variants.get(given["answer"])
            preference = "not sure" if chosen is None else "first" if chosen == OURS else "second"
            rows.append((values["rater"], given["question"], other, given["pair"], preference))
    return rows


# -- numbers ------------------------------------------------------------------------------------------------


def test_shares_and_counts_are_those_of_counting_by_hand(folder):
    found = results.evaluate(PAPERS, *read(folder), draws=200)
    assert len(found.table) == 4
    for row in found.table.iter_rows(named=True):
        own = [r for r in raw(folder) if (r[1], r[2]) == (row["question"], row["second"])]
        decided = [r for r in own if r[4] != "not sure"]
        assert row["first"] == OURS
        assert (row["n"], row["not_sure"]) == (len(decided), len(own) - len(decided)) and row["not_sure"] > 0
        assert row["share"] == pytest.approx(sum(r[4] == "first" for r in decided) / len(decided), abs=1e-15)
        assert row["raters"] == len({r[0] for r in decided}) and row["pairs"] == len({r[3] for r in decided})


def test_the_interval_over_raters_is_a_loop_that_draws_raters_with_all_their_answers(folder):
    """A naive cluster bootstrap with draws of its own; 20,000 draws settle an end to about 0.002."""
    found = results.evaluate(PAPERS, *read(folder), draws=20_000)
    row = found.table.row(0, named=True)
    assert row["resampled"] == "raters"
    of_rater: dict[str, list[bool]] = defaultdict(list)
    for rater, question, other, _, preference in raw(folder):
        if (question, other) == (row["question"], row["second"]) and preference != "not sure":
            of_rater[rater].append(preference == "first")
    generator, raters, shares = np.random.default_rng(99), list(of_rater.values()), []
    for _ in range(20_000):
        sampled = [answer for index in generator.integers(len(raters), size=len(raters)) for answer in raters[index]]
        shares.append(sum(sampled) / len(sampled))
    assert [row["low"], row["high"]] == pytest.approx(np.percentile(shares, [2.5, 97.5]), abs=0.012)


def test_raters_who_always_answer_alike_count_once_each_and_not_once_per_answer(tmp_path):
    """With 4 answers each, all of one taste, the interval over raters is sqrt(4) times as wide; answers make no n."""
    raters = []
    for number in range(30):
        sides = [("both", pair, True, "left" if number % 3 else "right") for pair in range(4)]
        raters.append(small.answers(FORCED, f"{number:016x}", sides))
    row = evaluated(FORCED, raters, tmp_path).table.row(0, named=True)
    over_raters, over_answers = row["high"] - row["low"], row["high_responses"] - row["low_responses"]
    assert over_raters / over_answers == pytest.approx(2, rel=0.1)


def test_intervals_over_raters_cover_the_truth_as_often_as_they_say():
    """1,000 studies of 60 raters with tastes of their own, 6 answers each. Taking answers for independent would not."""
    generator, truth, covered, taken_for_independent = np.random.default_rng(1), 1.5 / 2.5, 0, 0
    for study in range(1000):
        n = np.full(60, 6)
        wins = generator.binomial(n, generator.beta(1.5, 1, size=60))
        low, high = np.percentile(results.resampled_shares(wins, n, 1000, study), [2.5, 97.5])
        covered += low <= truth <= high
        if study < 200:
            answers = np.repeat([1, 0], [wins.sum(), n.sum() - wins.sum()])
            shares = results.resampled_shares(answers, np.ones_like(answers), 1000, study)
            low, high = np.percentile(shares, [2.5, 97.5])
            taken_for_independent += low <= truth <= high
    assert 930 <= covered <= 970
    assert taken_for_independent < 0.85 * 200


def test_both_intervals_are_those_of_scipy(folder):
    found = results.evaluate(PAPERS, *read(folder), draws=20_000)
    for row in found.table.iter_rows(named=True):
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for rater, question, other, _, preference in raw(folder):
            if (question, other) == (row["question"], row["second"]) and preference != "not sure":
                counts[rater][0] += preference == "first"
                counts[rater][1] += 1
        wins, n = (np.array(column, dtype=float) for column in zip(*counts.values(), strict=True))
        options = {"n_resamples": 20_000, "method": "percentile", "vectorized": True, "batch": 1000}
        over_raters = bootstrap(
            (wins, n),
            lambda w, m, axis: w.sum(axis=axis) / m.sum(axis=axis),
            paired=True,
            rng=np.random.default_rng(3),
            **options,
        ).confidence_interval
        single = np.concatenate([np.repeat([1.0, 0.0], [int(w), int(m - w)]) for w, m in zip(wins, n, strict=True)])
        over_answers = bootstrap((single,), np.mean, rng=np.random.default_rng(4), **options).confidence_interval
        assert [row["low"], row["high"]] == pytest.approx(list(over_raters), abs=0.012)
        assert [row["low_responses"], row["high_responses"]] == pytest.approx(list(over_answers), abs=0.03)


def test_where_every_rater_answers_once_responses_are_what_is_resampled(tmp_path):
    raters = [
        small.answers(FORCED, f"{number:016x}", [("both", number % CELLS, True, "left" if number % 3 else "right")])
        for number in range(24)
    ]
    row = evaluated(FORCED, raters, tmp_path).table.row(0, named=True)
    assert row["resampled"] == "responses" and row["share"] == pytest.approx(16 / 24)
    assert (row["low"], row["high"]) == (row["low_responses"], row["high_responses"])
    assert row["low"] < 16 / 24 < row["high"]


def by_pairs(units: list[list]) -> float:
    """Krippendorff's alpha as 1 - D_o / D_e, by walking over every two ratings."""
    units = [unit for unit in units if len(unit) > 1]
    ratings = [rating for unit in units for rating in unit]
    n = len(ratings)
    observed = sum(sum(a != b for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units) / n
    expected = sum(a != b for a, b in permutations(ratings, 2)) / (n * (n - 1))
    return 1 - observed / expected


def test_alpha_is_that_of_krippendorffs_worked_example():
    """Four observers, twelve units, missing ratings: nominal alpha 0.743 (Krippendorff 2011, section C)."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    counts = np.array([[column.count(value) for value in range(1, 6)] for column in zip(*observers, strict=True)])
    alpha = krippendorff_alpha(counts)
    assert alpha == pytest.approx(0.743, abs=5e-4)
    assert alpha == pytest.approx(by_pairs([[r for r in c if r is not None] for c in zip(*observers, strict=True)]))


def test_alpha_of_two_observers_is_the_example_counted_by_hand():
    """Krippendorff 2011, section A: two observers, ten units, values 0 and 1.

    Coincidences o_00 = 10, o_01 = o_10 = 4, o_11 = 2; n_0 = 14, n_1 = 6, n = 20; alpha = 1 - 19 * 4 / (14 * 6) = 0.095.
    """
    one, other = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    counts = np.array([[2 - a - b, a + b] for a, b in zip(one, other, strict=True)])
    assert krippendorff_alpha(counts) == pytest.approx(1 - 19 * 4 / (14 * 6), abs=1e-12)


def test_alpha_is_one_where_all_agree_on_both_values_and_undefined_where_nothing_can_be_told():
    assert krippendorff_alpha(np.array([[3, 0], [0, 2], [1, 0]])) == pytest.approx(1)
    assert krippendorff_alpha(np.array([[3, 0], [2, 0]])) is None
    assert krippendorff_alpha(np.array([[1, 0], [0, 1]])) is None
    assert krippendorff_alpha(np.zeros((0, 2))) is None


def test_agreement_is_that_of_the_raw_answers(folder):
    found = results.evaluate(PAPERS, *read(folder), draws=200)
    for row in found.table.iter_rows(named=True):
        units: dict[int, list[str]] = defaultdict(list)
        for _, question, other, pair, preference in raw(folder):
            if (question, other) == (row["question"], row["second"]) and preference != "not sure":
                units[pair].append(preference)
        assert row["alpha"] == pytest.approx(by_pairs(list(units.values())), abs=1e-12)
        assert row["alpha_pairs"] == sum(len(unit) > 1 for unit in units.values())


def test_the_verdict_needs_more_than_one_interval_that_leaves_a_half_out(tmp_path):
    """Four rows are looked at, so each is judged at 98.75 %."""
    found = evaluated(PAPERS, [one_rater(PAPERS, number) for number in range(40)], tmp_path)
    for row, shown in zip(found.table.iter_rows(named=True), found.summary["rows"], strict=True):
        wins, n = [], []
        for rater in sorted({r[0] for r in raw(tmp_path)}):
            own = [r[4] for r in raw(tmp_path) if r[0] == rater and (r[1], r[2]) == (row["question"], row["second"])]
            wins.append(own.count("first"))
            n.append(len(own) - own.count("not sure"))
        kept = np.array(n) > 0
        shares = results.resampled_shares(np.array(wins)[kept], np.array(n)[kept], results.DRAWS, 0)
        low, high = np.percentile(shares, [0.625, 99.375])
        assert row["verdict"] == ("first" if low > 0.5 else "second" if high < 0.5 else "undecided")
        assert shown["verdict"] == row["verdict"]
    assert found.summary["method"]["verdict"].startswith("the same interval at 98.75 %")


# -- what cannot be computed --------------------------------------------------------------------------------


def test_what_cannot_be_computed_is_absent_with_a_reason_and_never_nan(tmp_path):
    one = one_rater(PAPERS, 3)
    found = evaluated(PAPERS, [one], tmp_path)
    for row in found.table.iter_rows(named=True):
        assert row["low"] is None and row["alpha"] is None and row["verdict"] == "undecided"
        assert "one rater" in row["note"] and "no pair has two raters" in row["note"]
    alike = [
        small.answers(FORCED, f"{n:016x}", [("both", 0, True, "left"), ("both", 1, True, "left")]) for n in range(5)
    ]
    found = evaluated(FORCED, alike, tmp_path)
    row, empty = found.table.iter_rows(named=True)
    assert (
        row["share"] == 1 and row["low"] is None and "exact binomial" in row["note"] and "0.692 to 1.000" in row["note"]
    )
    assert empty["share"] is None and empty["note"] == "no decided answer" and empty["n"] == 0
    assert "NaN" not in json.dumps(found.summary)
    metrics = found.table.select(pl.selectors.float())
    assert not any(metrics[name].is_nan().any() for name in metrics.columns)


def test_few_raters_are_said_to_give_too_narrow_an_interval(tmp_path):
    found = evaluated(PAPERS, [one_rater(PAPERS, number) for number in range(5)], tmp_path)
    assert all("5 raters: the interval tends to be too narrow" in row["note"] for row in found.summary["rows"])


# -- files of answers ---------------------------------------------------------------------------------------


def test_a_file_that_goes_on_from_another_of_the_same_rater_counts_alone(folder):
    part = json.loads((folder / "rater_3.json").read_text())
    before = read(folder)
    part["answers"] = part["answers"][:5]
    (folder / "rater_99.json").write_text(json.dumps(part))
    assert read(folder)[0].equals(before[0])
    part["answers"][0]["answer"] = "not_sure" if part["answers"][0]["answer"] != "not_sure" else "left"
    (folder / "rater_99.json").write_text(json.dumps(part))
    with pytest.raises(InputError, match="of one rater and contradict each other"):
        read(folder)


def cut_off(values: dict) -> str:
    return json.dumps(values)[:-30]


def of_another_study(values: dict) -> str:
    return json.dumps(values | {"study": "0123456789abcdef"})


def of_images_never_together(values: dict) -> str:
    values["answers"][2]["left"] += 1
    return json.dumps(values)


def of_a_pair_that_is_not_there(values: dict) -> str:
    values["answers"][2]["pair"] = 10**6
    return json.dumps(values)


def twice_the_same_pair(values: dict) -> str:
    values["answers"][2] = values["answers"][1]
    return json.dumps(values)


def of_a_question_never_asked(values: dict) -> str:
    values["answers"][2]["question"] = "both"
    return json.dumps(values)


def of_no_choice(values: dict) -> str:
    values["answers"][2]["answer"] = "both of them"
    return json.dumps(values)


def without_a_number(values: dict) -> str:
    values["answers"][2]["seconds"] = float("nan")
    return json.dumps(values)


def with_too_many(values: dict) -> str:
    values["answers"] = values["answers"] * 2
    return json.dumps(values)


def with_another_key(values: dict) -> str:
    return json.dumps(values | {"favourite": "left"})


def no_json(values: dict) -> str:
    return "Hi, here are my answers!"


def nothing(values: dict) -> str:
    return ""


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_off, "is damaged or no file of answers"),
        (of_another_study, "answers another study (0123456789abcdef"),
        (of_images_never_together, "answer 3 is about images that the study never showed together"),
        (of_a_pair_that_is_not_there, "answer 3 is about images that the study never showed together"),
        (twice_the_same_pair, "answer 3 is about a pair that was answered before"),
        (of_a_question_never_asked, "answer 3 is to a question that the study never asked"),
        (of_no_choice, "at answers.2.answer"),
        (without_a_number, "at answers.2.seconds"),
        (with_too_many, "it should hold at most 16 answers"),
        (with_another_key, "at favourite"),
        (no_json, "is damaged or no file of answers"),
        (nothing, "is damaged or no file of answers"),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence_and_nothing_is_overwritten(spoil, said, folder, monkeypatch, capsys):
    (folder / results.SUMMARY).write_text("of yesterday")
    (folder / "rater_5.json").write_text(spoil(one_rater(PAPERS, 5)))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status, _, complaint = personalize(monkeypatch, capsys, "study-results", str(folder))
    assert status == 2 and complaint.count("\n") == 1
    assert "rater_5.json" in complaint and said in complaint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_forced_choice_takes_no_not_sure(tmp_path):
    values = small.answers(FORCED, "0" * 16, [("both", 0, True, "not_sure")])
    with pytest.raises(InputError, match="'not sure', which the page did not offer"):
        evaluated(FORCED, [values], tmp_path)


def test_bytes_that_are_no_text_are_refused(folder):
    (folder / "rater_5.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"rater_5\.json is text in UTF-16"):
        read(folder)


def test_answers_copied_with_a_mark_or_empty_lines_around_them_are_read(folder):
    before = read(folder)[0]
    path = folder / "rater_5.json"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + path.read_bytes() + b"\r\n\r\n")
    assert read(folder)[0].equals(before)


def test_what_programs_answer_is_no_study_and_is_not_mixed_with_people(folder, monkeypatch, capsys):
    people = personalize(monkeypatch, capsys, "study-results", str(folder))[1]
    assert people.startswith(f"Study {PAPERS.study}: ") and "stand-in" not in people
    path = folder / "rater_5.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"automated": True}))
    status, _, complaint = personalize(monkeypatch, capsys, "study-results", str(folder))
    assert status == 2 and "rater_5.json was answered by a program and others by people" in complaint
    status, out, _ = personalize(monkeypatch, capsys, "study-results", str(path))
    assert status == 0 and out.startswith("Automatic stand-in") and "no human study" in out
    assert json.loads((folder / results.SUMMARY).read_text())["what"].startswith("automatic stand-in")


def test_no_answers_at_all_are_refused(tmp_path):
    with pytest.raises(InputError, match="no file of answers was given"):
        answer_files.read([], PAPERS)
    with pytest.raises(InputError, match="hold no answer yet"):
        evaluated(PAPERS, [small.answers(PAPERS, "0" * 16, [])], tmp_path)


# -- the commands -------------------------------------------------------------------------------------------


def personalize(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, what it printed, what it complained)."""
    monkeypatch.setattr(sys, "argv", ["personalize", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


def test_results_are_shown_and_written_beside_the_answers_the_same_each_time(folder, monkeypatch, capsys):
    status, out, _ = personalize(monkeypatch, capsys, "study-results", str(folder))
    assert status == 0 and "14 answers" not in out and "of 14 raters" in out
    table, answers = pl.read_parquet(folder / results.TABLE), pl.read_parquet(folder / results.ANSWERS)
    summary = json.loads((folder / results.SUMMARY).read_text())
    assert len(answers) == 14 * PAPERS.questions_per_rater == summary["answers"]
    row = table.row(0, named=True)
    assert f"{row['share']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in out
    assert out.count("only 14 raters: the interval tends to be too narrow") == 1, "said once for all rows"
    assert summary["rows"] == list(table.iter_rows(named=True))
    stored = pl.read_parquet_metadata(folder / results.TABLE)
    assert all(stored[f"column:{name}"] for name in table.columns)
    written = {name: (folder / name).read_bytes() for name in (results.TABLE, results.ANSWERS, results.SUMMARY)}
    assert personalize(monkeypatch, capsys, "study-results", str(folder))[0] == 0, "and its own files are no answers"
    assert written == {name: (folder / name).read_bytes() for name in written}


def test_the_commands_from_grids_to_shares(tmp_path, monkeypatch, capsys):
    store = small.make(tmp_path / "workspace")
    to, root = tmp_path / "study", ["--root", str(store.root)]
    status, out, _ = personalize(
        monkeypatch, capsys, *root, "study", *small.VARIANTS[:2], "-q", "image", "--per-rater", "6", "--to", str(to)
    )
    assert status == 0 and "each rater answers 6 questions" in out and str(to / "study.html") in out
    key = Key.read(to / "study_key.json")
    for number in range(3):
        given = [("image", pair, True, "left") for pair in range(number, number + 6)]
        (tmp_path / f"{number}.json").write_text(json.dumps(small.answers(key, f"{number:016x}", given)))
    files = [str(tmp_path / f"{number}.json") for number in range(3)]
    assert "with --key" in personalize(monkeypatch, capsys, "study-results", *files)[2]
    status, out, _ = personalize(
        monkeypatch, capsys, "study-results", *files, "--key", str(to / "study_key.json"), "--to", str(tmp_path / "out")
    )
    assert status == 0 and "1.000" in out and (tmp_path / "out" / results.TABLE).is_file()
    status, _, complaint = personalize(
        monkeypatch, capsys, *root, "study", *small.VARIANTS[:2], "-q", "taste", "--to", str(tmp_path / "other")
    )
    assert status == 2 and complaint.count("\n") == 1 and "'text', 'image' or 'both'" in complaint
