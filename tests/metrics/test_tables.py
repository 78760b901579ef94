"""Tables of scores: what may stand in them, how they are kept, and what their summaries mean."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats

from personalize_core.errors import InputError
from personalize_core.metrics import held_out, parquet, ranking, statistics, summaries, tables

ROOT = Path(tables.__file__).parents[2]


def row(**changes) -> dict[str, Any]:
    """One valid row."""
    made = {
        "base_model": "mini",
        "concept": "dog7",
        "method": "dreambooth",
        "variant": "dreambooth",
        "prompt_index": 0,
        "prompt": "a photo of a {}",
        "image_index": 0,
        "image": "data/grids/dreambooth/dog7/dreambooth/00_00.png",
        "image_sha256": "0" * 64,
        "metric": "dino",
        "encoder": "mini-identity",
        "encoder_sha256": "1" * 64,
        "preprocessing": "RGB; shorter side to 64, bicubic; centre crop 64",
        "text": None,
        "headline": True,
        "pairs": 5,
        "foreground": None,
        "score": 0.5,
    } | changes
    metric = made["metric"] if made["metric"] in tables.MEASURES else "dino"
    return tables.contract_of(metric, made["method"]) | made


def grid(variant, score, concepts=("cat", "dog7"), prompts=3, images=4, method=None, **changes):
    """A row for each cell; score(concept number, prompt, image) -> float."""
    return [
        row(
            concept=concept,
            method=method or variant,
            variant=variant,
            prompt_index=prompt,
            prompt=f"a photo of a {{}} in place {prompt}",
            image_index=image,
            image=f"data/grids/{variant}/{concept}/{prompt:02d}_{image:02d}.png",
            score=float(score(number, prompt, image)),
            **changes,
        )
        for number, concept in enumerate(concepts)
        for prompt in range(prompts)
        for image in range(images)
    ]


def noisy(level, seed, spread=0.1):
    generator = np.random.default_rng(seed)
    return lambda *cell: level + spread * generator.normal()


@pytest.fixture
def table():
    return tables.from_rows(
        grid("base_model", noisy(0.3, seed=1))
        + grid("dreambooth", noisy(0.6, seed=2))
        + grid("dreambooth", noisy(0.25, seed=3), metric="clip_t", encoder="mini-clip", text="a photo of a dog")
        + [
            row(
                base_model=None,
                method="real_images",
                variant="real_images",
                prompt_index=None,
                prompt=None,
                image_index=index,
                image=f"data/concepts/dog7/{index:02d}.png",
                score=0.8 + index / 100,
            )
            for index in range(4)
        ]
    )


# -- what may stand in a table ---------------------------------------------------------------------------------


def test_every_column_is_documented():
    assert all(column.meaning for column in tables.COLUMNS.values())
    assert list(tables.SCHEMA) == list(tables.COLUMNS)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_refused_with_the_image_named(score):
    with pytest.raises(InputError, match=r"the dino of .*00_00.png is .*must be left out"):
        tables.from_rows([row(), row(prompt_index=1, score=score)])


def test_a_column_that_is_missing_unknown_or_of_another_type_is_named():
    valid = tables.from_rows([row()])
    with pytest.raises(InputError, match="no column 'encoder_sha256'"):
        tables.checked(valid.drop("encoder_sha256"))
    with pytest.raises(InputError, match="a column 'mood' that no table"):
        tables.checked(valid.with_columns(mood=pl.lit(1)))
    with pytest.raises(InputError, match="column 'score' holds Float32, where Float64 is expected"):
        tables.checked(valid.with_columns(pl.col("score").cast(pl.Float32)))
    with pytest.raises(ValueError, match="no column 'moood'"):
        tables.from_rows([row(moood=1)])


def test_an_empty_value_is_refused_where_there_must_be_one():
    tables.from_rows([row(prompt=None, prompt_index=None, base_model=None)])
    with pytest.raises(InputError, match="column 'encoder' is empty in row 0"):
        tables.from_rows([row(encoder=None)])


def test_a_column_that_may_be_empty_may_be_left_out_of_a_row():
    real = {
        name: value for name, value in row().items() if name not in ("base_model", "prompt_index", "prompt", "text")
    }
    table = tables.from_rows([real])
    assert table.schema == tables.SCHEMA
    assert table["prompt_index"].to_list() == [None]
    with pytest.raises(InputError, match="column 'encoder' is empty in row 0"):
        tables.from_rows([{name: value for name, value in real.items() if name != "encoder"}])


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="no metric is called 'fid'; known are clip_t, "):
        tables.from_rows([row(metric="fid")])


def test_two_scores_of_one_image_by_one_encoder_are_refused():
    with pytest.raises(InputError, match="two dino scores of .*00_00.png by 'mini-identity'"):
        tables.from_rows([row(), row(score=0.6)])
    tables.from_rows([row(), row(metric="clip_i"), row(image_index=1), row(prompt_index=1), row(concept="cat")])


# -- on disk ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(table, tmp_path):
    tables.write(table, tmp_path / "deep" / "scores.parquet")
    assert tables.read(tmp_path / "deep" / "scores.parquet").equals(table)


def test_equal_tables_give_equal_bytes_whatever_the_order_of_their_rows(table, tmp_path):
    tables.write(table, tmp_path / "a.parquet")
    shuffled = table.sample(fraction=1, shuffle=True, seed=5).select(sorted(table.columns))
    tables.write(pl.concat([shuffled[:7], shuffled[7:]], rechunk=False), tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_another_process_writes_the_same_bytes(table, tmp_path):
    tables.write(table, tmp_path / "here.parquet")
    program = (
        "import sys; from personalize_core.metrics import tables;"
        "tables.write(tables.read(sys.argv[1]), sys.argv[2]); assert 'torch' not in sys.modules"
    )
    there = tmp_path / "there.parquet"
    subprocess.run([sys.executable, "-c", program, tmp_path / "here.parquet", there], check=True, cwd=ROOT)
    assert there.read_bytes() == (tmp_path / "here.parquet").read_bytes()


def test_a_refused_table_leaves_the_old_file_and_nothing_else(table, tmp_path):
    path = tmp_path / "scores.parquet"
    tables.write(table, path)
    before = path.read_bytes()
    with pytest.raises(InputError):
        tables.write(table.with_columns(score=pl.lit(float("nan"))), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


def test_the_meaning_of_the_columns_travels_in_the_file(table, tmp_path):
    tables.write(table, tmp_path / "scores.parquet")
    assert parquet.meanings_in(tmp_path / "scores.parquet") == {n: c.meaning for n, c in tables.COLUMNS.items()}
    summary = summaries.summarise(table, draws=10)
    summaries.write_summary(summary, tmp_path / "summary.parquet")
    assert set(parquet.meanings_in(tmp_path / "summary.parquet")) == set(summary.columns)


def test_what_is_no_table_of_scores_is_refused_in_one_sentence(table, tmp_path):
    with pytest.raises(InputError, match="there is no table .*nowhere.parquet"):
        tables.read(tmp_path / "nowhere.parquet")
    (tmp_path / "text.parquet").write_text("not at all")
    with pytest.raises(InputError, match="text.parquet is not a Parquet file"):
        tables.read(tmp_path / "text.parquet")
    table.drop("metric").write_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="other.parquet has no column 'metric'"):
        tables.read(tmp_path / "other.parquet")


# -- joining ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder": "dino-s16"}, "encoder 'mini-identity' and 'dino-s16'"),
        ({"encoder_sha256": "2" * 64}, "encoder_sha256 '111111111111' and '222222222222'"),
        ({"preprocessing": "squashed"}, "preprocessing 'RGB.*' and 'squashed'"),
        ({"headline": False}, "headline True and False"),
    ],
)
def test_scores_of_different_encoders_do_not_join_and_the_difference_is_named(changes, named):
    one, other = tables.from_rows([row()]), tables.from_rows([row(concept="vase", **changes)])
    with pytest.raises(InputError, match=f"cannot be joined, for their dino .*{named}"):
        tables.concatenate([one, other])
    with pytest.raises(InputError, match="cannot be joined"):
        summaries.summarise(pl.concat([one, other]))


def test_masked_scores_by_different_masks_do_not_join():
    masked = {"metric": "dino_masked", "foreground": 0.4}
    one = tables.from_rows([row(**masked, mask="grey, by mini-segmenter")])
    other = tables.from_rows([row(**masked, mask="grey, by clipseg", concept="vase")])
    with pytest.raises(InputError, match="dino_masked .*mask 'grey, by mini-segmenter' and 'grey, by clipseg'"):
        tables.concatenate([one, other])


def test_tables_by_one_encoder_and_by_two_do_not_join():
    second = {"encoder": "dino-s16", "headline": False}
    two = tables.from_rows([row(), row(**second)])
    assert len(tables.concatenate([two, tables.from_rows([row(concept="vase"), row(concept="vase", **second)])])) == 4
    with pytest.raises(InputError, match="encoder 'dino-s16' and 'mini-identity' and 'mini-identity'"):
        tables.concatenate([two, tables.from_rows([row(concept="vase")])])


def test_one_encoder_of_a_metric_is_the_headline():
    for one, other in ((True, True), (False, False)):
        with pytest.raises(InputError, match="one encoder of dino must be the headline, and only one"):
            summaries.summarise(tables.from_rows([row(headline=one), row(encoder="dino-s16", headline=other)]))


def test_a_metric_that_a_concept_lacks_altogether_hinders_no_join():
    masked = row(metric="dino_masked", mask="grey", foreground=0.5)
    assert len(tables.concatenate([tables.from_rows([row(), masked]), tables.from_rows([row(concept="vase")])])) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaling": "x2.5"}, "a row of dino has scaling 'x2.5', not plain"),
        ({"pairing": tables.OTHER_REAL}, "a row of dino has pairing 'real images i != j', not all pairs G x R"),
        ({"metric": "clip_t", "text_variant": "slot_deleted"}, "text_variant 'slot_deleted', not class_phrase"),
        (
            {"metric": "dino_masked", "mask": "none", "foreground": 0.5},
            "a row of dino_masked has mask 'none', not a rule",
        ),
        ({"metric": "dino_masked", "mask": "grey"}, "foreground of .* is None under the mask 'grey'"),
        ({"metric": "dino_masked", "mask": "grey", "foreground": 1.5}, "foreground of .* is 1.5"),
        ({"foreground": 0.5}, "foreground of .* is 0.5 under the mask 'none'"),
        ({"pairs": 0}, "pairs is 0 in row 0"),
    ],
)
def test_a_row_whose_contract_is_not_that_of_its_metric_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        tables.from_rows([row(**changes)])


def test_macro_and_micro_averages_weigh_images_differently():
    scores = {("cat", 0): [0.1, 0.3], ("cat", 1): [0.7], ("dog7", 0): [0.9]}
    pairs = {"cat": 4, "dog7": 6}
    rows = [
        row(
            concept=concept,
            prompt_index=prompt,
            prompt=f"{{}} {prompt}",
            image_index=index,
            score=score,
            pairs=pairs[concept],
        )
        for (concept, prompt), found in scores.items()
        for index, score in enumerate(found)
    ]
    summary = summaries.summarise(tables.from_rows(rows), draws=100)
    everything = summary.filter(concept=tables.ALL_CONCEPTS).row(0, named=True)
    assert everything["mean"] == pytest.approx(((0.2 + 0.7) / 2 + 0.9) / 2)
    assert everything["micro"] == pytest.approx((4 * (0.1 + 0.3 + 0.7) + 6 * 0.9) / (3 * 4 + 6))


def test_images_without_the_concept_are_counted_and_stay_in_the_mean():
    shares = [0.3, 0.0099, 0.01, 0.0]
    rows = [
        row(metric="dino_masked", mask="grey", image_index=index, foreground=share, score=0.1 * index)
        for index, share in enumerate(shares)
    ]
    summary = summaries.summarise(tables.from_rows([*rows, row()]), draws=100).filter(concept=tables.ALL_CONCEPTS)
    found = {one["metric"]: one for one in summary.iter_rows(named=True)}
    assert (found["dino_masked"]["n_empty"], found["dino_masked"]["images"]) == (2, 4)
    assert found["dino_masked"]["mean"] == pytest.approx(0.15)
    assert found["dino"]["n_empty"] is None


def test_the_ranking_goes_by_the_headline_encoder_alone():
    baseline, better = noisy(0.3, seed=1), noisy(0.6, seed=2)
    second = {"encoder": "dino-s16", "headline": False}
    rows = grid("base_model", baseline) + grid("dreambooth", better)
    rows += grid("base_model", better, **second) + grid("dreambooth", baseline, **second)
    compared = ranking.pairs(table := tables.from_rows(rows), draws=200)
    assert compared["encoder"].to_list() == ["mini-identity"] and compared["difference"][0] < 0
    ranked = ranking.rank(compared, summaries.summarise(table, draws=200))
    assert ranked["variant"].to_list() == ["dreambooth", "base_model"]


def test_two_metrics_may_have_an_encoder_each():
    one = tables.from_rows([row()])
    other = tables.from_rows([row(metric="clip_i", encoder="mini-clip", encoder_sha256="3" * 64)])
    assert len(tables.concatenate([one, other])) == 2


def test_a_row_that_tables_share_stands_once_but_two_scores_of_one_image_are_refused():
    baseline = row(method="base_model", variant="base_model")
    one, other = tables.from_rows([row(), baseline]), tables.from_rows([row(variant="dreambooth_long"), baseline])
    assert len(tables.concatenate([one, other])) == 3
    with pytest.raises(InputError, match="two dino scores"):
        tables.concatenate([one, tables.from_rows([row(score=0.51)])])


def test_there_is_nothing_to_join_in_no_tables():
    with pytest.raises(ValueError, match="no tables"):
        tables.concatenate([])


# -- summaries -------------------------------------------------------------------------------------------------


def pick(summary, variant, metric="dino", concept=tables.ALL_CONCEPTS):
    chosen = summary.filter(variant=variant, metric=metric, concept=concept)
    assert len(chosen) == 1
    return chosen.row(0, named=True)


def test_means_are_over_images_then_prompts_then_concepts():
    uneven = (
        grid("dreambooth", lambda c, p, i: 0.1 * i, concepts=["cat"], prompts=1, images=4)
        + [row(concept="cat", prompt_index=1, prompt="a photo of a {} in place 1", score=0.9)]
        + grid("dreambooth", lambda c, p, i: 0.5 + 0.1 * p, concepts=["dog7"], prompts=3, images=2)
    )
    summary = summaries.summarise(tables.from_rows(uneven), draws=10)
    cat = ((0.0 + 0.1 + 0.2 + 0.3) / 4 + 0.9) / 2
    dog = (0.5 + 0.6 + 0.7) / 3
    assert pick(summary, "dreambooth", concept="cat")["mean"] == pytest.approx(cat)
    assert pick(summary, "dreambooth", concept="dog7")["mean"] == pytest.approx(dog)
    everything = pick(summary, "dreambooth")
    assert everything["mean"] == pytest.approx((cat + dog) / 2)
    assert (everything["images"], everything["prompts"], everything["concepts"]) == (11, 3, 2)


def test_real_images_are_averaged_though_they_have_no_prompt(table):
    real = pick(summaries.summarise(table, draws=10), "real_images", concept="dog7")
    assert real["mean"] == pytest.approx(np.mean([0.8, 0.81, 0.82, 0.83]))
    assert (real["images"], real["prompts"]) == (4, 0)


def test_the_interval_of_one_concept_is_over_its_prompts(table):
    ours = pick(summaries.summarise(table), "dreambooth", concept="cat")
    means = (
        table.filter(variant="dreambooth", metric="dino", concept="cat")
        .group_by("prompt_index")
        .agg(pl.col("score").mean())["score"]
    )
    check_against_student(ours, means.to_numpy(), "mean")
    assert ours["over"] == "prompts"


def test_the_interval_of_several_concepts_is_over_concepts_and_prompts():
    table = tables.from_rows(grid("dreambooth", noisy(0.6, seed=2), ["cat", "dog7", "vase"]))
    ours = pick(summaries.summarise(table), "dreambooth")
    y = table["score"].to_numpy().reshape(3, 3, 4).mean(axis=2)
    concepts, prompts = (index.ravel() for index in np.indices((3, 3)))
    variance, freedom = statistics.crossed_variance(concepts, prompts, y.ravel())
    assert (ours["error"], ours["freedom"]) == (pytest.approx(variance**0.5), pytest.approx(freedom))
    assert ours["over"] == "concepts and prompts"


def test_the_difference_is_paired_and_its_interval_is_students(table):
    cell = ["concept", "prompt_index", "image_index"]
    dino = table.filter(metric="dino", concept="cat")
    both = dino.filter(variant="dreambooth").join(dino.filter(variant="base_model"), on=cell)
    ours = pick(summaries.difference_from_baseline(table), "dreambooth", concept="cat")
    both = both.with_columns(difference=pl.col("score") - pl.col("score_right"))
    check_against_student(
        ours, both.group_by("prompt_index").agg(pl.col("difference").mean())["difference"].to_numpy(), "difference"
    )
    assert (ours["images"], ours["unpaired"]) == (12, 0)


def check_against_student(ours, values, name):
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert ours[name] == pytest.approx(values.mean())
    assert ours["high"] - ours["low"] == pytest.approx(high - low)
    assert ours["low"] < ours[name] < ours["high"]


def test_a_prompt_is_its_text_wherever_it_stands_in_a_list():
    generator = np.random.default_rng(5)
    rows = grid("dreambooth", lambda *_: generator.normal(), concepts=["cat", "dog7", "vase"])
    moved = [cell | {"prompt_index": 2 - cell["prompt_index"]} if cell["concept"] == "cat" else cell for cell in rows]
    before, after = (pick(summaries.summarise(tables.from_rows(cells)), "dreambooth") for cells in (rows, moved))
    assert before["error"] == pytest.approx(after["error"]) and before["prompts"] == after["prompts"] == 3
    own = [cell | {"prompt": f"{cell['prompt']} of {cell['concept']}"} for cell in rows]
    alone = pick(summaries.summarise(tables.from_rows(own)), "dreambooth")
    assert alone["prompts"] == 9 and alone["error"] != pytest.approx(before["error"])


def test_images_of_two_prompts_are_no_pair_though_they_have_one_place():
    other = [cell | {"prompt": "a {} on the moon"} for cell in grid("base_model", lambda *_: 0.1)]
    table = tables.from_rows(other + grid("dreambooth", lambda *_: 0.5))
    assert summaries.difference_from_baseline(table, draws=10).is_empty()


def test_a_constant_gain_shows_however_much_the_cells_vary():
    baseline = noisy(0.4, seed=7, spread=0.3)
    scores = {(c, p, i): baseline() for c in range(2) for p in range(3) for i in range(4)}
    table = tables.from_rows(
        grid("base_model", lambda *cell: scores[cell]) + grid("dreambooth", lambda *cell: scores[cell] + 0.01)
    )
    gain = pick(summaries.difference_from_baseline(table), "dreambooth")
    assert gain["low"] == pytest.approx(0.01) and gain["high"] == pytest.approx(0.01)
    summary = summaries.summarise(table)
    assert pick(summary, "dreambooth")["low"] < pick(summary, "base_model")["high"]  # unpaired, nothing shows


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    names = [f"concept{number}" for number in range(8)]
    table = tables.from_rows(grid("dreambooth", noisy(0.5, seed=9), names, prompts=5, images=1))
    assert summaries.summarise(table, seed=3).equals(summaries.summarise(table, seed=3))
    assert not summaries.summarise(table, seed=3).equals(summaries.summarise(table, seed=4))


def test_the_order_of_the_rows_changes_nothing(table):
    shuffled = table.sample(fraction=1, shuffle=True, seed=8)
    assert summaries.summarise(shuffled).equals(summaries.summarise(table))
    assert summaries.difference_from_baseline(shuffled).equals(summaries.difference_from_baseline(table))


def test_a_single_image_has_a_score_and_no_interval():
    only = pick(summaries.summarise(tables.from_rows([row()])), "dreambooth")
    assert only["mean"] == 0.5
    assert [only[name] for name in ("low", "high", "error", "freedom", "over")] == [None] * 5


def test_concept_images_of_one_concept_are_judged_by_leaving_each_out(table):
    real = pick(summaries.summarise(table), "real_images", concept="dog7")
    expected = statistics.of_pairs([np.array([0.8, 0.81, 0.82, 0.83])])
    assert (real["low"], real["high"]) == pytest.approx((expected.low, expected.high))
    assert real["over"] == "concept_images"


def test_without_the_baseline_there_is_no_difference():
    with pytest.raises(InputError, match="baseline 'base_model' has no scores.*, of dreambooth"):
        summaries.difference_from_baseline(tables.from_rows([row()]))


def test_images_without_a_counterpart_are_left_out_and_counted():
    table = tables.from_rows(
        grid("base_model", lambda c, p, i: 0.2, images=1)
        + grid("dreambooth", lambda c, p, i: 0.5 + i, images=2)
        + grid("elsewhere", lambda c, p, i: 0.9, concepts=["vase"])
    )
    differences = summaries.difference_from_baseline(table, draws=10)
    ours = pick(differences, "dreambooth")
    assert (ours["images"], ours["unpaired"]) == (6, 6)
    assert ours["difference"] == pytest.approx(0.3)
    assert differences.filter(variant="elsewhere").is_empty()


def test_a_metric_that_was_not_measured_has_no_row(table):
    assert summaries.summarise(table, draws=10).filter(metric="clip_i").is_empty()
    differences = summaries.difference_from_baseline(table, draws=10)
    assert differences.filter(metric="clip_t").is_empty()  # the baseline has none


def test_base_models_are_not_mixed():
    baselines = {"mini": 0.1, "sd15": 0.3}
    table = tables.from_rows(
        [
            cell | {"base_model": base_model}
            for base_model, level in baselines.items()
            for cell in grid("base_model", lambda *_, level=level: level)
        ]
        + grid("dreambooth", lambda *_: 0.5, base_model="sd15")
    )
    assert len(summaries.summarise(table, draws=10).filter(variant="base_model", concept=tables.ALL_CONCEPTS)) == 2
    gain = pick(summaries.difference_from_baseline(table, draws=10), "dreambooth")
    assert gain["base_model"] == "sd15" and gain["difference"] == pytest.approx(0.2) and gain["images"] == 24


# -- what a score can be ---------------------------------------------------------------------------------------

ENDS = {"dino": (-1, 1), "clip_t_scaled": (0, 2.5), "judge_cp": (0, 1)}  # of a cosine, of CLIPScore, of a judge


def test_the_range_of_a_metric_is_the_one_that_its_meaning_states():
    for name, meaning in tables.METRICS.items():
        low, high = tables.range_of(name)
        assert f"in [{low:g}, {high:g}]" in meaning, name
    assert tables.range_of("dino", 1) == (-2, 2) and tables.range_of("dino", 2) == (-4, 4)
    assert tables.range_of("clip_t_scaled", 1) == (-2.5, 2.5)


@pytest.mark.parametrize("metric", list(ENDS))
def test_an_interval_ends_where_a_score_or_a_difference_can_be_no_further(metric):
    """Three concepts that could not differ more: Student's t alone would go far beyond."""
    low, high = ENDS[metric]
    far = {
        "base_model": lambda concept, prompt, _: high if concept == 1 else low + 0.1 * prompt,
        "dreambooth": lambda concept, prompt, _: low if concept == 1 else high - 0.1 * prompt,
        "oft": lambda concept, prompt, _: (low + high) / 2 + 0.01 * concept + 0.02 * prompt,
    }
    table = tables.from_rows(
        [one for name, score in far.items() for one in grid(name, score, ("a", "b", "c"), images=1, metric=metric)]
    )
    summary, pairs = summaries.summarise(table), ranking.pairs(table)
    width = high - low
    found = [(summary, "mean", low, high), (summaries.difference_from_baseline(table), "difference", -width, width)]
    for frame, mean, least, most in [*found, (pairs, "difference", -width, width)]:
        assert frame["low"].min() == least or frame["high"].max() == most, "or the test shows nothing"
        assert ((frame["low"] >= least) & (frame["high"] <= most)).all()
        assert ((frame["low"] <= frame[mean]) & (frame[mean] <= frame["high"])).all()
    inside = pick(summary, "oft", metric)  # where nothing is beyond, nothing is cut off
    own = table.filter(variant="oft")
    whole = statistics.estimate(*(own[name].to_numpy() for name in ("concept", "prompt_index", "score")))
    assert (inside["low"], inside["high"]) == (pytest.approx(whole.low), pytest.approx(whole.high))


def test_a_mean_that_rounding_put_beyond_what_it_can_be_stays_in_its_interval():
    one = statistics.Estimate(1 + 1e-7, 1 + 1e-7, 1 + 1e-7, 0.0, 3.0, "prompts")
    assert one.within(-1, 1) == one
    assert statistics.Estimate(0.5).within(-1, 1) == statistics.Estimate(0.5)


def test_the_difference_that_copying_makes_has_its_ends_too():
    """Held out and trained on are two scores of an image, and what is beyond the base model is a second difference."""
    sides = {
        "dino": (tables.HELD_OUT, lambda concept, prompt, _: -1.0 if concept else 1 - 0.1 * prompt),
        "dino_trained_on": (tables.TRAINED_ON, lambda concept, prompt, _: 1.0 if concept else -1 + 0.1 * prompt),
    }
    rows = []
    for metric, (references, score) in sides.items():
        for variant, sign in (("base_model", -1), ("dreambooth", 1)):
            rows += grid(
                variant, lambda *cell, s=sign, f=score: s * f(*cell), ("a", "b", "c"), images=1, metric=metric,
                references=references,
            )  # fmt: skip
    found = held_out.what_copying_adds(tables.from_rows(rows)).filter(concept=tables.ALL_CONCEPTS)
    assert found["low"].sort()[0] == -2 and found["high"].sort()[-1] <= 2
    beyond = found.filter(variant="dreambooth").row(0, named=True)
    assert 2 < beyond["beyond_high"] <= 4 and beyond["beyond_low"] >= -4
