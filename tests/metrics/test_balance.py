"""The balance of identity and text alignment, against numbers worked out by hand."""

from __future__ import annotations

import polars as pl
import pytest

from personalize_core.errors import InputError
from personalize_core.metrics import balance, ended_early, tables
from personalize_core.metrics.statistics import Estimate, Noise


def scores(values, concept="rex"):
    """values: (prompt, image) -> (DINO, CLIP-T)."""
    rows = []
    for (prompt, image), pair in values.items():
        for metric, encoder, value in zip(("dino", "clip_t"), ("vit", "clip"), pair, strict=True):
            rows.append(
                {
                    "base_model": "tiny",
                    "concept": concept,
                    "method": "oft",
                    "variant": "oft",
                    "prompt_index": prompt,
                    "prompt": f"{{}} in place {prompt}",
                    "image_index": image,
                    "image": "x.png",
                    "image_sha256": "0",
                    "metric": metric,
                    "encoder": encoder,
                    "encoder_sha256": "0",
                    "preprocessing": "none",
                    "text": "a text" if metric == "clip_t" else None,
                    "headline": True,
                    "pairs": 1,
                    "score": value,
                }
            )
    return tables.from_rows(rows)


def test_it_is_the_geometric_mean_of_an_image_and_the_mean_of_means_of_prompts():
    found = balance.per_image(scores({(0, 0): (0.9, 0.4), (0, 1): (0.4, 0.4), (1, 0): (0.16, 0.25)}))
    assert found["score"].to_list() == pytest.approx([0.6, 0.4, 0.2])
    means = balance.means(found)
    assert means.balance == pytest.approx((0.5 + 0.2) / 2)
    assert means.identity == pytest.approx((0.65 + 0.16) / 2)
    assert means.text == pytest.approx((0.4 + 0.25) / 2)


def test_an_image_that_lacks_either_has_none():
    found = balance.per_image(scores({(0, 0): (-0.5, 0.4), (0, 1): (0.4, -0.1), (0, 2): (-0.4, -0.1)}))
    assert found["score"].to_list() == [0, 0, 0]


def test_an_image_without_identity_is_left_out():
    table = scores({(0, 0): (0.9, 0.4), (1, 0): (0.4, 0.4)})
    table = table.filter(~((pl.col("metric") == "dino") & (pl.col("prompt_index") == 1)))
    assert balance.means(balance.per_image(table)).balance == pytest.approx(0.6)


@pytest.mark.parametrize("metric", ["dino", "clip_t"])
def test_without_either_metric_it_says_what_to_write(metric):
    table = scores({(0, 0): (0.9, 0.4)}).filter(pl.col("metric") != metric)
    with pytest.raises(InputError, match="class_phrase and an identity encoder"):
        balance.per_image(table)


def test_differences_are_paired_image_by_image():
    noise = {"a": 0.3, "b": -0.2, "c": 0.1}  # of concepts, the same for both recipes
    sides = []
    for gain in (0.0, 0.05):
        tables_of = [
            balance.per_image(scores({(p, 0): (0.5 + shift + gain, 0.5 + shift + gain) for p in range(2)}, name))
            for name, shift in noise.items()
        ]
        sides.append(pl.concat(tables_of))
    today, found = sides
    estimate = balance.difference(found, today)
    assert estimate and estimate.mean == pytest.approx(0.05)
    assert estimate.low == pytest.approx(0.05) and estimate.high == pytest.approx(0.05)  # nothing varies but the gain
    wide = balance.estimate(found)
    assert wide.low is not None and wide.high is not None and wide.high - wide.low > 0.5


def test_the_noise_of_training_widens_an_interval_about_two_concepts_alone():
    def side(gain, names):
        each = [{(p, 0): (0.5 + gain * p, 0.5 + gain * p) for p in range(3)} for _ in names]
        return pl.concat([balance.per_image(scores(v, name)) for v, name in zip(each, names, strict=True)])

    for names, widens in ((("a", "b"), True), (("a", "b", "c"), False)):
        alone = balance.difference(side(0.1, names), side(0.0, names))
        noisy = balance.difference(side(0.1, names), side(0.0, names), noise=Noise(0.01, 8))
        assert alone and noisy and alone.error is not None and noisy.error is not None
        if widens:
            assert noisy.error**2 == pytest.approx(alone.error**2 + 0.01)
        else:
            assert noisy.error == alone.error


def test_its_interval_and_those_of_differences_end_where_it_can_be_no_further():
    """Two prompts that could not differ more, whose interval by Student's t has one degree of freedom."""
    early = scores({(0, 0): (1.0, 1.0), (1, 0): (0.0, 0.0)})
    fixed = scores({(0, 0): (-1.0, 0.5), (1, 0): (1.0, 1.0)})
    images = balance.per_image(early), balance.per_image(fixed)
    ends = {"score": (-1, 1), "identity": (-2, 2), "text": (-2, 2)}
    found = [(balance.estimate(images[0]), (0, 1))]
    found += [(balance.difference(*images, what=what), each) for what, each in ends.items()]
    both = pl.concat([early, fixed.with_columns(variant=pl.lit("fixed"))])
    column = ended_early.EndedEarly("oft", "fixed", {"rex": (1, 2)})
    table = ended_early.what_it_changed(both, [column], ["dino", "clip_t"])
    words = {"dino": "identity", "clip_t": "text", ended_early.BALANCE: "score"}
    found += [
        (Estimate(row["difference"], row["low"], row["high"]), ends[words[row["metric"]]]) for row in table.to_dicts()
    ]
    assert len(found) == 7
    for estimate, (least, most) in found:
        assert estimate is not None and estimate.low is not None and estimate.high is not None
        assert (estimate.low, estimate.high) == (least, most) and least <= estimate.mean <= most
