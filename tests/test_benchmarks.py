"""The benchmark suite compares equal work: both sides compute the same losses, gradients, latents and scores."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import card
from benchmarks.suite import __main__ as suite
from benchmarks.suite import bare, cell, sampling, table, training
from benchmarks.suite.floor import flops_of
from benchmarks.suite.models import clip_tokenizer
from benchmarks.suite.one_step import add_gradients_of_step
from benchmarks.suite.recipe_cost import SECOND, steps_of
from benchmarks.suite.rows import SEED, random_latents
from benchmarks.suite.setting import CONCEPT, Models, Setting
from benchmarks.suite.timing import Deadline, Measured, take_turns, timed
from personalize_core.methods import METHOD_NAMES, is_trained, recipe_class
from personalize_core.training.loop import noisy_rows

GRADIENTS, LATENTS, SCORES = 1e-5, 1e-4, 1e-5  # how far both sides may be apart, of the largest number


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Any]:
    """What a quick run of the whole suite writes."""
    return json.loads(
        suite.main(["--quick", "--device", "cpu", "--results", str(tmp_path_factory.mktemp("bench"))]).read_text()
    )


def rows_of(written: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in written["rows"] if row["part"] == part}


@pytest.mark.slow
def test_every_part_is_measured_and_every_number_is_there(written):
    assert rows_of(written, "training").keys() == training.PAIRS.keys()
    assert rows_of(written, "sampling").keys() == set(sampling.SAMPLED)
    assert len(rows_of(written, "scoring")) == 1
    assert rows_of(written, "whole cell").keys() == set(cell.CELLS)
    assert {what.partition(", ")[0] for what in rows_of(written, "bare")} == set(filter(is_trained, METHOD_NAMES))
    assert written["matrix_rate"] > 0
    for row in written["rows"]:
        assert len(row["our_seconds"]) == len(row["their_seconds"]) == (2 if row["part"] == "bare" else 1)
        ratios = [own / other for own, other in zip(row["our_seconds"], row["their_seconds"], strict=True)]
        assert row["ratio"]["median"] == pytest.approx(sum(ratios) / len(ratios))  # the median of one or two
        if row["part"] != "whole cell":
            assert row["floor"] == pytest.approx(row["flops"] / written["matrix_rate"])


@pytest.mark.slow
def test_both_sides_do_the_same_work(written):
    """Losses and gradients of a step from the same noise; latents from the same noise; scores of the same images."""
    for part, limit in (("training", GRADIENTS), ("sampling", LATENTS), ("scoring", SCORES)):
        for name, row in rows_of(written, part).items():
            assert row["apart"] <= limit, name


@pytest.mark.parametrize("name", ["dreambooth", "textual_inversion"])
def test_the_bare_unet_has_the_gradients_of_a_step(name):
    """Of the weights where a method trains them, and of the text where it trains that; the other has none."""
    setting = Setting(Models("tiny", "cpu", "fp32"), 1, 1, 1, 1, Deadline())
    base, images = setting.models.base, random_latents(setting.models.base)
    method: Any = setting.method(name, setting.recipe(name))
    stage = method.stages()[0]
    rows = noisy_rows(method, base, images, stage, SEED, 0)
    bare_unet = bare.BareUNet(setting.models, bare.Reached.by(stage, method, base, rows.batch.prompts))
    context = base.encode(rows.batch.prompts, CONCEPT)
    text = context.hidden.detach().requires_grad_(bare_unet.text_has_gradient)
    bare_unet.step(rows.x_t, rows.t, text, rows.target, rows.batch.weight)

    if name == "dreambooth":
        add_gradients_of_step(method, base, images, stage)
        assert text.grad is None
        for name, weight in method.unet.items():
            torch.testing.assert_close(bare_unet.unet.get_parameter(name).grad, weight.grad, atol=1e-5, rtol=1e-4)
    else:
        own = context.hidden.detach().requires_grad_()
        prediction = base.denoise(rows.x_t, rows.t, dataclasses.replace(context, hidden=own))
        torch.nn.functional.mse_loss(prediction, rows.target).backward()
        torch.testing.assert_close(text.grad, own.grad, atol=1e-6, rtol=1e-4)
        assert all(weight.grad is None for weight in bare_unet.unet.parameters())


def test_other_gradients_and_other_parameters_are_told():
    ours = (2.0, {"a": torch.tensor([1.0, -4.0])})
    assert training.difference(ours, (2.0, {"a": torch.tensor([1.0, -4.0])})) == 0
    assert training.difference(ours, (2.0, {"a": torch.tensor([2.0, -4.0])})) == 0.25
    assert training.difference(ours, (3.0, {"a": torch.tensor([1.0, -4.0])})) == 0.5
    with pytest.raises(ValueError, match="'b'"):
        training.difference(ours, (2.0, {"a": torch.tensor([1.0, -4.0]), "b": torch.zeros(1)}))


def test_attention_on_a_cpu_is_counted_with_its_gradient():
    """Two products of (5, 4) x (4, 7) and back; in the gradient the first again, and two for each of them."""
    query, key = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 7, 4, requires_grad=True)

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, key)

    product = 2 * (2 * 3) * 5 * 7 * 4
    assert flops_of(attend) == 2 * product
    assert flops_of(lambda: attend().sum().backward()) == (2 + 5) * product


def test_ways_take_turns_and_end_at_the_deadline():
    done: list[str] = []
    ways = {name: timed(lambda name=name: done.append(name), "cpu") for name in ("ours", "theirs")}
    times = take_turns(ways, 9, Deadline(0), before=lambda: done.append("-"))
    assert [name for name in done if name != "-"] == ["ours", "theirs", "theirs", "ours"]  # one round does not count
    assert done[::2] == ["-"] * 4
    assert {name: len(some) for name, some in times.items()} == {"ours": 1, "theirs": 1}


def test_a_ratio_is_the_median_over_rounds_with_its_quartiles():
    ratio = Measured("a", "b", "c", "step", [1, 2, 3, 4, 10], [1, 1, 1, 1, 2], None, None, None, 0.0).ratio
    assert (ratio.lower, ratio.median, ratio.upper) == (2, 3, 4)


def test_the_tokenizer_without_a_hub_is_clips():
    """The numbers are those of openai/clip-vit-large-patch14's tokenizer."""
    tokenizer: Any = clip_tokenizer("<|endoftext|>")
    assert len(tokenizer) == 49_408
    assert tokenizer("a photo of a sks dog").input_ids == [49406, 320, 1125, 539, 320, 48136, 1929, 49407]


@pytest.mark.slow
def test_the_script_for_a_card_measures_every_part_on_tiny_models(monkeypatch, tmp_path, capsys):
    """With no time of its own a part does the least it can."""
    least = {size: [dataclasses.replace(part, share=0.0) for part in parts] for size, parts in card.PARTS.items()}
    monkeypatch.setattr(card, "PARTS", least)
    path = card.main(["--size", "tiny", "--device", "cpu", "--precision", "fp32", "--results", str(tmp_path)])
    found, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert found["failed"] == {}
    recipes = {recipe["method"]: recipe for recipe in found["recipes"]}
    assert recipes.keys() == {"attn_dreambooth", "personalized_residuals", "textual_inversion"}
    for name, recipe in recipes.items():
        published = list(steps_of(recipe_class(name)()).values())
        assert [stage["published_steps"] for stage in recipe["stages"]] == published
        assert [stage["measured_steps"] for stage in recipe["stages"]] == [SECOND] * len(published)
        assert all(stage["seconds_per_step"] > 0 and stage["flops"] > 0 for stage in recipe["stages"])
        assert recipe["memory"]["peak_memory_bytes"] > 0
        assert not recipe["whole"]
    assert [row["part"] for row in found["rows"]] == ["training", "training", "training", "sampling", "scoring"]
    assert all(line.count("|") in (0, 9, 10) for line in printed.splitlines())


def test_the_script_for_a_card_ends_with_what_it_has_and_says_what_failed(monkeypatch, tmp_path):
    def fail(setting: Any) -> Any:
        raise RuntimeError("out of memory\nand more")

    row = Measured("training", "x", "y", "step", [1.0], [2.0], 1.0, 1.0, 0.0, 0.0)
    parts = [card.Part("one", 1.0, fail), card.Part("two", 1.0, lambda setting: row)]
    monkeypatch.setattr(card, "PARTS", {"sd-1.4": parts})
    found = card.Found(tmp_path / "card.json", {})
    card.run(found, "tiny", "cpu", "fp32", 60.0)
    assert (found.failed, found.rows) == ({"one": "RuntimeError: out of memory"}, [row])
    assert json.loads(found.path.read_text())["failed"] == found.failed
    nothing = card.Found(tmp_path / "none.json", {})
    card.run(nothing, "tiny", "cpu", "fp32", 0.0)
    assert nothing.failed == dict.fromkeys(["one", "two"], "no time was left")


def test_the_shares_of_the_time_leave_some_for_making_the_models():
    assert sum(part.share for parts in card.PARTS.values() for part in parts) < 0.9


def test_a_table_shows_times_ratio_and_floor():
    row = Measured("training", "oft", "PEFT", "step", [0.02] * 3, [0.01] * 3, 1e9, 0.004, 2e-7, 0.5, "2 batch items")
    line = table.markdown([row]).splitlines()[-1]
    assert re.sub(r" +", " ", line) == (
        "| training | oft | PEFT | 20 ms | 10 ms | **2.00** (2.00 to 2.00) | 4 ms | 2e-07 | 2 batch items |"
    )


def test_make_bench_runs_the_suite():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert re.search(r"^bench: .*\n\t\$\(BIN\)/python -m benchmarks\.suite$", makefile, re.M)
