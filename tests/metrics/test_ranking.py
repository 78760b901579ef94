"""Verdicts: which of several variants is better, where it stays undecided, and what training again changes."""

import itertools
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats

from personalize_core.errors import InputError
from personalize_core.metrics import costs, parquet, ranking, statistics, summaries, tables
from personalize_core.report import comparison_in_words
from tests.metrics.test_tables import grid, noisy

CONCEPTS = [f"concept{number}" for number in range(6)]


def four(seed=0, spread=0.02):
    """Two variants well above the baseline and alike; one between them and it."""
    levels = {"base_model": 0.2, "alike_a": 0.6, "alike_b": 0.6, "middle": 0.4}
    return tables.from_rows(
        [
            cell
            for number, (variant, level) in enumerate(levels.items())
            for cell in grid(variant, noisy(level, seed=[seed, number], spread=spread), CONCEPTS, prompts=5, images=2)
        ]
    )


def of(compared, variant, other):
    return compared.filter(variant=variant, other=other).row(0, named=True)


def test_what_differs_is_told_and_what_does_not_cannot_be():
    compared = ranking.pairs(four())
    assert len(compared) == 6
    assert of(compared, "alike_a", "alike_b")["verdict"] == "undecided"
    assert of(compared, "alike_a", "base_model")["verdict"] == "higher"
    assert of(compared, "base_model", "middle")["verdict"] == "lower"
    ranked = ranking.rank(compared, summaries.summarise(four())).rows_by_key("variant", named=True, unique=True)
    assert set(compared["level"]) == {ranking.level_of_one(0.05, 4)}
    places = {name: (row["place_from"], row["place_to"]) for name, row in ranked.items()}
    assert places == {"alike_a": (1, 2), "alike_b": (1, 2), "middle": (3, 3), "base_model": (4, 4)}
    assert ranked["alike_a"]["cannot_tell_from"] == "alike_b"
    assert ranked["alike_a"]["above"] == "base_model, middle"


def test_a_pair_is_compared_image_by_image():
    table = four()
    found = of(ranking.pairs(table), "alike_a", "middle")
    order = ["concept", "prompt_index", "image_index"]
    one, other = (table.filter(variant=name).sort(order)["score"].to_numpy() for name in ("alike_a", "middle"))
    cells = (one - other).reshape(6, 5, 2).mean(axis=2)
    concepts, prompts = (index.ravel() for index in np.indices((6, 5)))
    variance, freedom = statistics.crossed_variance(concepts, prompts, cells.ravel(), cautious=True)
    assert found["difference"] == pytest.approx(cells.mean())
    assert found["error"] == pytest.approx(variance**0.5)
    width = 2 * scipy.stats.t.ppf(1 - found["level"] / 2, freedom) * variance**0.5
    assert found["high"] - found["low"] == pytest.approx(width)
    assert (found["images"], found["prompts"], found["concepts"], found["unpaired"]) == (60, 5, 6, 0)


@pytest.mark.parametrize("variants", [2, 4, 10])
def test_the_level_is_tukeys(variants):
    """Of the largest of all differences between independent values, in a simulation of its own."""
    values = np.random.default_rng(0).normal(size=(200_000, variants))
    critical = np.quantile(np.ptp(values, axis=1) / 2**0.5, 0.95)
    assert scipy.stats.norm.isf(ranking.level_of_one(0.05, variants) / 2) == pytest.approx(critical, abs=0.015)
    assert 0.05 / (variants * (variants - 1) / 2) <= ranking.level_of_one(0.05, variants) <= 0.05


@pytest.mark.parametrize(("methods", "spread", "tables_tried"), [(4, 1.0, 300), (8, 0.3, 150)])
def test_among_equal_methods_all_intervals_hold_in_95_of_100_tables(methods, spread, tables_tried):
    """Or more, where concepts and prompts differ little (`cautious`). Without it the second holds in 84 of 100."""
    concepts, prompts = (index.ravel() for index in np.indices((8, 5)))
    level, held = ranking.level_of_one(0.05, methods), 0
    for seed in range(tables_tried):
        generator = np.random.default_rng(seed)
        sampled = [
            spread * (generator.normal(size=(8, 1)) + generator.normal(size=(1, 5)))
            + 0.77 * generator.normal(size=(8, 5))
            for _ in range(methods)
        ]
        held += all(
            (found := estimate_of(concepts, prompts, one - other, level)).low <= 0 <= found.high
            for one, other in itertools.combinations(sampled, 2)
        )
    assert held / tables_tried >= 0.92


def estimate_of(concepts, prompts, cells, level) -> Any:
    return statistics.estimate(concepts, prompts, cells.ravel(), draws=50, level=level, cautious=True)


def test_neither_the_order_of_rows_nor_real_images_change_a_verdict():
    table = four()
    real = table.filter(variant="middle").head(4)
    real = real.with_columns(
        pl.lit("real_images").alias("method"),
        pl.lit("real_images").alias("variant"),
        pl.lit(tables.OTHER_REAL).alias("pairing"),
        *(pl.lit(None, dtype=table.schema[name]).alias(name) for name in ("base_model", "prompt", "prompt_index")),
        pl.int_range(4).alias("image_index"),
    )
    shuffled = pl.concat([table.sample(fraction=1, shuffle=True, seed=2), real])
    assert ranking.pairs(shuffled).equals(ranking.pairs(table))


def test_variants_without_a_common_cell_cannot_be_told_apart():
    table = tables.from_rows(
        grid("dreambooth", lambda *_: 0.9, concepts=["cat"]) + grid("oft", lambda *_: 0.1, concepts=["vase"])
    )
    only = ranking.pairs(table).row(0, named=True)
    assert (only["verdict"], only["difference"], only["images"], only["unpaired"]) == ("undecided", None, 0, 24)


def test_cells_that_one_lacks_are_left_out_and_counted():
    table = four().filter(~((pl.col("variant") == "middle") & (pl.col("concept") == "concept3")))
    found = of(ranking.pairs(table), "alike_a", "middle")
    assert (found["images"], found["concepts"], found["unpaired"]) == (50, 5, 10)


def test_equal_scores_and_single_images_cannot_be_told_apart():
    equal = tables.from_rows(grid("a", lambda *_: 0.5) + grid("b", lambda *_: 0.5))
    assert ranking.pairs(equal)["verdict"].to_list() == ["undecided"]
    single = {"concepts": ["cat"], "prompts": 1, "images": 1}
    one = tables.from_rows(grid("a", lambda *_: 0.5, **single) + grid("b", lambda *_: 0.1, **single))
    assert ranking.pairs(one).row(0, named=True)["verdict"] == "undecided"


def test_a_table_of_one_variant_has_a_rank_and_no_pair():
    table = tables.from_rows(grid("a", noisy(0.5, seed=1)))
    compared = ranking.pairs(table)
    assert compared.is_empty() and list(compared.columns) == list(ranking.PAIR_COLUMNS)
    only = ranking.rank(compared, summaries.summarise(table)).row(0, named=True)
    assert (only["place_from"], only["place_to"]) == (1, 1)


def test_the_terminal_says_what_cannot_be_told(tmp_path):
    compared = ranking.pairs(table := four())
    ranking.write(compared, ranking.rank(compared, summaries.summarise(table)), tmp_path)
    heading, *rows = comparison_in_words.verdicts(tmp_path)
    assert heading == ["By", "Place", "Variant", "Verdict"]
    verdicts = {variant: (by, place, words) for by, place, variant, words in rows}
    assert verdicts["alike a"] == ("DINO", "1 to 2", "above base model, middle; undecided against alike b")
    assert verdicts["middle"] == ("DINO", "3", "above base model")
    assert verdicts["base model"] == ("DINO", "4", "-")


def test_the_columns_are_documented_in_the_files(tmp_path):
    compared = ranking.pairs(table := four())
    ranking.write(compared, ranked := ranking.rank(compared, summaries.summarise(table)), tmp_path)
    assert set(parquet.meanings_in(tmp_path / "pairs.parquet")) == set(compared.columns)
    assert set(parquet.meanings_in(tmp_path / "rank.parquet")) == set(ranked.columns)


# -- training again ----------------------------------------------------------------------------------------------


def trainings(of_seeds=0.1, of_concepts=0.05, seeds=4, concepts=CONCEPTS):
    """Each training shifts all concepts together, and each concept by itself."""
    generator = np.random.default_rng(1)
    shared = of_seeds * generator.normal(size=seeds)
    own = of_concepts * generator.normal(size=(seeds, len(concepts)))
    level = {"dreambooth": 0.6, "oft": 0.6}
    made = {}
    for seed in range(seeds):
        cells = grid("base_model", lambda *_: 0.2, concepts)
        for name in level:
            shift = shared[seed] + own[seed]
            cells += grid(name, lambda c, p, i, s=shift, n=name: level[n] + s[c] + 0.01 * p + 0.001 * i, concepts)
        made[seed] = tables.from_rows(cells)
    return made, shared[:, None] + own


def test_the_training_noise_is_the_standard_deviation_between_trainings():
    made, shifts = trainings()
    noise = ranking.training_noise(made)
    assert set(noise["variant"]) == {"dreambooth", "oft"}  # the base model trains nothing
    whole = noise.filter(variant="oft", concept=tables.ALL_CONCEPTS).row(0, named=True)
    assert whole["between"] == pytest.approx(np.std([row.mean() for row in shifts], ddof=1))
    assert whole["least"] == pytest.approx(scipy.stats.t.ppf(0.975, 3) * 2**0.5 * whole["between"])
    assert whole["trainings"] == 4
    one = noise.filter(variant="oft", concept="concept2").row(0, named=True)
    assert one["between"] == one["beyond"] == pytest.approx(np.std(shifts[:, 2], ddof=1))


def test_of_several_concepts_only_what_a_seed_does_to_all_alike_is_beyond_the_interval():
    generator = np.random.default_rng(2)
    found = [
        ranking.beyond_the_interval(0.3 * generator.normal(size=(1, 4)) + 0.5 * generator.normal(size=(8, 4)) + levels)
        for levels in generator.normal(size=(3000, 8, 1))
    ]
    # never below 0, hence a little above the truth on average
    assert 0.3**2 < np.mean(np.square(found)) < 0.3**2 + 0.25 * 0.5**2 / 8
    alone = [ranking.beyond_the_interval(generator.normal(size=(8, 4))) for _ in range(500)]
    assert np.mean(np.array(alone) == 0) > 0.4


def test_the_noise_of_training_can_leave_undecided_what_one_concept_had_decided():
    made, _ = trainings(concepts=["cat"], of_seeds=0.2)
    levels = {"dreambooth": 0.6, "oft": 0.65, "base_model": 0.2}
    table = tables.from_rows(
        [cell for name, level in levels.items() for cell in grid(name, noisy(level, seed=3, spread=1e-4), ["cat"])]
    )
    before, after = ranking.pairs(table), ranking.pairs(table, ranking.training_noise(made))
    assert of(before, "dreambooth", "oft")["verdict"] == "lower"
    assert of(after, "dreambooth", "oft")["verdict"] == "undecided"
    noise = ranking.training_noise(made).filter(variant="oft", concept="cat")["between"][0]
    assert of(after, "dreambooth", "oft")["training_noise"] == pytest.approx(2**0.5 * noise)
    assert of(after, "base_model", "oft")["training_noise"] == pytest.approx(noise)  # the baseline trains nothing
    assert of(before, "dreambooth", "oft")["training_noise"] is None


def test_noise_needs_two_trainings_that_made_the_same():
    made, _ = trainings(seeds=2)
    with pytest.raises(InputError, match="between two trainings at least"):
        ranking.training_noise({0: made[0]})
    with pytest.raises(InputError, match="the training with seed 1 has no dino of oft"):
        ranking.training_noise({0: made[0], 1: made[1].filter(pl.col("variant") != "oft")})
    apart = {0: made[0].filter(concept="concept0"), 1: made[1].filter(concept="concept1")}
    with pytest.raises(InputError, match="no image of dreambooth has been sampled from all its trainings"):
        ranking.training_noise(apart)


# -- costs -------------------------------------------------------------------------------------------------------


def test_costs_stand_beside_the_means_and_what_is_unknown_is_empty(tmp_path):
    for name, parameters in (("cat", 10), ("dog7", 30)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"parameters": {parameters}}}')
        (tmp_path / name / "weights.safetensors").write_bytes(b"0" * parameters * 4)
    found = costs.table([("dreambooth", name, tmp_path / name) for name in ("cat", "dog7", "vase")])
    assert found.row(2)[2:] == (None, None)
    summary = summaries.summarise(tables.from_rows(grid("dreambooth", noisy(0.5, seed=1))), draws=10)
    rows = costs.beside(summary, found).rows_by_key("concept", named=True, unique=True)
    assert (rows["cat"]["parameters"], rows["cat"]["artifact_bytes"]) == (10, 40)
    whole = rows[tables.ALL_CONCEPTS]
    assert (whole["parameters"], whole["artifact_bytes"]) == (20, 80)
    assert costs.beside(summary, found).drop(list(costs.COLUMNS)).equals(summary)
