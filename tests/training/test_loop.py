"""The loop: stages in order, one optimizer step at a time, resumed to the bit, and nothing left behind."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Method, Stage
from personalize_core.methods.recipe import Recipe
from personalize_core.randomness import generator_for, seed_for
from personalize_core.training import loop, micro_batches, readings
from personalize_core.training.checkpoints import Checkpoints, LogRow
from personalize_core.training.loop import clipped, denoising_step, diffusion_loss, train
from personalize_core.training.micro_batches import RowsAtOnce
from personalize_core.training.readings import Readings
from tests.conftest import EVERY_STEP, equal_bits, snapshot, tiny_base


class TwoStages(Method):
    """Learns a direction to add to the text in its first stage, and the text's scale in its second."""

    steps_seen: torch.Tensor

    def __init__(self, base, concept) -> None:
        super().__init__(Recipe(), base, concept)
        self.direction = nn.Parameter(torch.zeros(base.text_width))
        self.scale = nn.Parameter(torch.ones(base.text_width))
        self.register_buffer("steps_seen", torch.zeros(2))
        self.dropout = nn.Dropout(0.5)

    def stages(self):
        def penalty(step):
            return {"length": 0.1 * self.direction.pow(2).sum()}

        def after(number):
            def seen(index):
                self.steps_seen[number] += 1 + index

            return seen

        first = {"params": [self.direction], "lr": 1e-2}
        second = {"params": [self.scale], "lr": 1e-3}
        return [
            Stage("direction", 3, 2, [first], penalty, after(0)),
            Stage("scale", 2, 1, [second], after_step=after(1)),
        ]

    def condition(self, base, prompts):
        context = base.encode(prompts, self.concept)
        moved = self.dropout(self.scale) * context.hidden + self.direction
        return lambda t: type(context)(**{**vars(context), "hidden": moved})


@pytest.fixture
def base():
    return tiny_base()


@pytest.fixture
def method(base, concept):
    return TwoStages(base, concept)


# -- stages ----------------------------------------------------------------------------------------------------


def test_stages_run_in_order_and_every_step_is_logged(method, base, images):
    rows = train(method, base, images, seed=0)
    assert [(row["stage"], row["step"]) for row in rows] == [("direction", 0), ("direction", 1), ("direction", 2)] + [
        ("scale", 0),
        ("scale", 1),
    ]
    assert set(rows[0]) == {"stage", "step", "diffusion", "length", "gradient_norm", "lr"}
    assert set(rows[-1]) == {"stage", "step", "diffusion", "gradient_norm", "lr"}


def test_no_gradient_is_left(method, base, images):
    train(method, base, images, seed=0)
    assert all(parameter.grad is None for parameter in method.parameters())


def test_every_row_has_the_rate_of_each_group_of_its_stage(method, base, images, monkeypatch):
    first, second = method.stages()
    two = [{"params": [method.direction], "lr": 1e-2}, {"params": [method.scale], "lr": 5e-4}]
    monkeypatch.setattr(method, "stages", lambda: [replace(first, param_groups=two), second])
    assert [row["lr"] for row in train(method, base, images, seed=0)] == [[1e-2, 5e-4]] * 3 + [[1e-3]] * 2


def test_what_a_method_says_of_itself_after_a_step_stands_in_that_steps_row(method, base, images, monkeypatch):
    monkeypatch.setattr(method, "metrics", lambda: {"first": method.direction[0].detach()})
    first = []
    rows = train(method, base, images, 0, lambda row: first.append({"first": method.direction[0].item()}))
    assert [row["learned"] for row in rows] == first
    assert rows[0]["learned"]["first"] != 0  # where it is after the step, not before


def test_by_default_a_method_says_what_its_parts_say(method):
    class Part(nn.Module):
        def metrics(self):
            return {"size": torch.tensor(3.0)}

    assert method.metrics() == {}
    method.part = Part()
    assert method.metrics() == {"size": 3.0}


def test_whoever_listens_hears_each_row_as_it_comes(method, base, images):
    heard = []
    assert train(method, base, images, 0, heard.append) == heard


def test_a_stage_moves_only_what_is_its_own(method, base, images):
    seen = {}

    def log(row):
        seen[row["stage"]] = (method.direction.detach().clone(), method.scale.detach().clone())

    train(method, base, images, 0, log)
    assert seen["direction"][0].any() and torch.equal(seen["direction"][1], torch.ones(32))
    assert torch.equal(seen["scale"][0], seen["direction"][0]) and not torch.equal(seen["scale"][1], torch.ones(32))


def test_in_a_stage_only_what_is_its_own_asks_for_gradient(method, base, images):
    seen = []
    train(
        method, base, images, 0, lambda row: seen.append((method.direction.requires_grad, method.scale.requires_grad))
    )
    assert seen == [(True, False)] * 3 + [(False, True)] * 2


def test_a_method_hears_of_the_end_of_every_step(method, base, images):
    train(method, base, images, seed=0)
    assert method.steps_seen.tolist() == [1 + 2 + 3, 1 + 2]


def test_a_method_without_stages_has_nothing_to_train(base, concept, images):
    class Nothing(Method):
        def stages(self):
            return []

    assert train(Nothing(Recipe(), base, concept), base, images, seed=0) == []


# -- a step ----------------------------------------------------------------------------------------------------


def test_a_step_is_adamws_with_the_gradient_clipped_to_length_one(base, concept, images):
    """Loshchilov & Hutter 2019 with torch's constants, in float64."""

    class Steep(TwoStages):
        def stages(self):
            stage = super().stages()[1]
            return [Stage("scale", 2, 1, stage.param_groups, lambda step: {"steep": (30 * self.scale).sum()})]

    method = Steep(base, concept)
    seen = []

    def log(row):
        assert method.scale.grad is not None
        seen.append((method.scale.grad.double().numpy().copy(), row["gradient_norm"]))

    train(method, base, images, 0, log)
    w, m, v = np.ones(32), np.zeros(32), np.zeros(32)
    for count, (gradient, norm) in enumerate(seen, start=1):
        assert norm > 100  # of the gradient before it was clipped
        np.testing.assert_allclose(np.linalg.norm(gradient), 1, atol=1e-5)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w = w * (1 - 1e-3 * 1e-2) - 1e-3 * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
    np.testing.assert_allclose(method.scale.detach().numpy(), w, atol=1e-6)


def test_a_gradient_shorter_than_one_is_left_as_it_is(method, base, images):
    seen = []
    train(method, base, images, 0, lambda row: seen.append((row["gradient_norm"], method.direction.grad)))
    norm, gradient = seen[0]
    assert norm < 1
    torch.testing.assert_close(gradient.norm().item(), norm)


def test_the_loss_is_the_rows_means_by_their_weights(method, base, images):
    class Weighted(TwoStages):
        def batch(self, images, size, generator):
            weight = torch.tensor([0.5, 0.0, 2.0]).view(3, 1, 1, 1)
            return replace(super().batch(images, 3, generator), weight=weight)

    with torch.no_grad():
        step = denoising_step(Weighted(base, method.concept), base, images, method.stages()[0], seed=0, index=0)
    error = (step.prediction.double().numpy() - step.target.double().numpy()) ** 2
    expected = 0.5 * error[0].mean() + 2.0 * error[2].mean()
    np.testing.assert_allclose(diffusion_loss(step).item(), expected, rtol=1e-5)


def test_a_weight_may_differ_from_pixel_to_pixel(method, base, images):
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:4] = 0.5

    class Masked(TwoStages):
        def batch(self, images, size, generator):
            return replace(super().batch(images, size, generator), weight=mask)

    with torch.no_grad():
        step = denoising_step(Masked(base, method.concept), base, images, method.stages()[0], seed=0, index=0)
    error = (step.prediction.double().numpy() - step.target.double().numpy()) ** 2
    np.testing.assert_allclose(
        diffusion_loss(step).item(), (error * mask.numpy()).mean(axis=(1, 2, 3)).sum(), rtol=1e-5
    )


def test_noise_and_timesteps_depend_on_seed_stage_and_step_alone(method, base, concept, images):
    stage = method.stages()[0]
    draws = {}
    with torch.no_grad():
        for seed, index, name in ((0, 0, "a"), (0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
            torch.manual_seed(len(draws))
            other = Stage(name, stage.steps, stage.batch_size, [])
            step = denoising_step(method, base, images, other, seed, index)
            if (seed, index, name) in draws:
                assert torch.equal(draws[seed, index, name], step.x_t)
            draws[seed, index, name] = step.x_t
    assert len({tuple(x_t.flatten().tolist()) for x_t in draws.values()}) == 4


def test_two_methods_of_one_seed_see_the_same_noise(method, base, concept, images):
    class Other(TwoStages):
        pass

    with torch.no_grad():
        one = denoising_step(method, base, images, method.stages()[0], seed=4, index=2)
        other = denoising_step(Other(base, concept), base, images, method.stages()[0], seed=4, index=2)
    assert torch.equal(one.x_t, other.x_t) and torch.equal(one.t, other.t)


@pytest.mark.parametrize("first", [0, 800])
def test_timesteps_are_uniform_from_the_stages_first_to_the_last(first, method, base, images):
    stage = Stage("many", 1, 500, [], min_timestep=first)

    class Blind(TwoStages):
        def condition(self, base, prompts):
            raise RuntimeError

    sampled = []
    original = base.scheduler.add_noise
    base.scheduler.add_noise = lambda latents, noise, t: sampled.append(t) or original(latents, noise, t)
    for index in range(20):
        with pytest.raises(RuntimeError):
            denoising_step(Blind(base, method.concept), base, images, stage, 0, index)
    t = torch.cat(sampled).numpy()
    assert (t.min(), t.max()) == (first, 999)  # 10,000 draws: each end is missed with probability 5e-5
    counts, _ = np.histogram(t, bins=10, range=(first, 1000))
    assert abs(counts - 1000).max() < 150  # five standard deviations of a binomial count


def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(method, base, images):
    broken = ConceptLatents([torch.full_like(views, float("nan")) for views in images.concept])
    before = snapshot(base)
    with pytest.raises(FloatingPointError, match="stage 'direction', step 0: the loss is diffusion = nan, length = 0"):
        train(method, base, broken, seed=0)
    assert equal_bits(snapshot(base), before)


def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a graphics card."""
    monkeypatch.setattr(loop, "Readings", lambda device: Readings(torch.device("cuda")))
    monkeypatch.setattr(readings, "TOGETHER", 3)


def test_losses_that_are_read_late_are_the_same_losses(concept, base, images, tmp_path, monkeypatch):
    """Also those of a run that was cut off, and a listener hears of each step when it is done."""
    log = train(TwoStages(base, concept), base, images, seed=0)
    read_late(monkeypatch)
    unread = []
    assert train(TwoStages(base, concept), base, images, 0, lambda row: unread.append(row["diffusion"] is None)) == log
    assert unread == [True, True, False, True, True]

    for last in range(1, len(log)):
        rows, checkpoints = [], Checkpoints(tmp_path / str(last), "stamp", **EVERY_STEP)

        def cut_off(row: LogRow, rows: list[LogRow] = rows, last: int = last) -> None:
            rows.append(row)
            if len(rows) > last:
                raise CutOff

        with pytest.raises(CutOff):
            train(TwoStages(base, concept), base, images, 0, cut_off, checkpoints)
        assert checkpoints.load().history == log[:last]
        assert train(TwoStages(base, concept), base, images, 0, checkpoints=checkpoints) == log


def test_a_loss_that_is_not_finite_is_noticed_before_a_checkpoint_and_a_few_steps_later_at_most(
    concept, base, images, tmp_path, monkeypatch
):
    read_late(monkeypatch)

    class Broken(TwoStages):
        def stages(self):
            groups = super().stages()[0].param_groups
            return [Stage("only", 9, 1, groups, lambda step: {"at_step": torch.tensor(1.0) / (1 - len(heard))})]

    heard, checkpoints = [], Checkpoints(tmp_path, "stamp")
    with pytest.raises(FloatingPointError, match="stage 'only', step 1: .*at_step = inf"):
        train(Broken(base, concept), base, images, 0, heard.append, checkpoints)
    assert len(heard) == 2  # the third step's reading raised
    heard, checkpoints = [], Checkpoints(tmp_path, "stamp", **EVERY_STEP)
    with pytest.raises(FloatingPointError, match="stage 'only', step 1"):
        train(Broken(base, concept), base, images, 0, heard.append, checkpoints)
    assert [row["step"] for row in checkpoints.load().history] == [0]


def test_a_penalty_that_is_not_finite_is_named(base, concept, images):
    class Broken(TwoStages):
        def stages(self):
            first = super().stages()[0]
            infinite = torch.tensor(float("inf"))
            return [Stage("first", 3, 1, first.param_groups, lambda step: {"endless": infinite})]

    with pytest.raises(FloatingPointError, match="stage 'first', step 0: .*diffusion = [0-9.]+, endless = inf"):
        train(Broken(base, concept), base, images, seed=0)


# -- cut off and resumed ---------------------------------------------------------------------------------------


class CutOff(Exception):
    """As a machine that goes down."""


def cut_off_after(rows: int):
    heard = []

    def log(row):
        heard.append(row)
        if len(heard) == rows:
            raise CutOff

    return log


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_wherever_it_was_cut_off_a_run_resumes_to_the_same_bits(rows, base, concept, images, tmp_path):
    undisturbed = TwoStages(base, concept)
    expected = train(undisturbed, base, images, seed=3)
    checkpoints = Checkpoints(tmp_path, "this run", **EVERY_STEP)
    with pytest.raises(CutOff):
        train(TwoStages(base, concept), base, images, 3, cut_off_after(rows), checkpoints)
    resumed, heard = TwoStages(base, concept), []
    assert train(resumed, base, images, 3, heard.append, checkpoints) == expected
    assert heard == expected[rows - 1 :]  # the row that was cut off had not been kept yet
    assert equal_bits(resumed.state_dict(), undisturbed.state_dict())


def test_a_run_may_be_cut_off_again_and_again(base, concept, images, tmp_path):
    expected = train(TwoStages(base, concept), base, images, seed=3)
    checkpoints = Checkpoints(tmp_path, "this run", **EVERY_STEP)
    for _ in range(4):
        with pytest.raises(CutOff):
            train(TwoStages(base, concept), base, images, 3, cut_off_after(2), checkpoints)
    assert train(TwoStages(base, concept), base, images, 3, checkpoints=checkpoints) == expected


def test_a_finished_run_resumes_to_itself_without_a_step(method, base, concept, images, tmp_path):
    checkpoints, heard = Checkpoints(tmp_path, "this run", **EVERY_STEP), []
    expected = train(method, base, images, 3, checkpoints=checkpoints)
    again = TwoStages(base, concept)
    assert train(again, base, images, 3, heard.append, checkpoints) == expected
    assert heard == [] and equal_bits(again.state_dict(), method.state_dict())


def test_a_checkpoint_of_anything_else_is_not_read(method, base, concept, images, tmp_path):
    train(method, base, images, 3, checkpoints=Checkpoints(tmp_path, "another run", **EVERY_STEP))
    heard = []
    train(TwoStages(base, concept), base, images, 3, heard.append, Checkpoints(tmp_path, "this run"))
    assert len(heard) == 5


def test_checkpoints_are_as_rare_as_asked(method, base, images, tmp_path):
    train(method, base, images, 3, checkpoints=Checkpoints(tmp_path, "this run", every_seconds=3600))
    assert list(tmp_path.iterdir()) == []


def test_a_cleared_checkpoint_is_gone_and_may_be_cleared_again(method, base, images, tmp_path):
    checkpoints = Checkpoints(tmp_path, "this run", **EVERY_STEP)
    train(method, base, images, 3, checkpoints=checkpoints)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    checkpoints.clear()
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_read(method, base, images, tmp_path):
    checkpoints = Checkpoints(tmp_path, "this run", **EVERY_STEP)
    for content in (b"", b"not safetensors at all", b"\xff" * 100):
        Path(checkpoints.path).write_bytes(content)
        assert checkpoints.load().history == []


# -- randomness ------------------------------------------------------------------------------------------------


def test_dropout_follows_the_seed_of_the_run_and_not_torchs_own(base, concept, images):
    logs = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(global_seed)
        logs.append(train(TwoStages(base, concept), base, images, seed))
    assert logs[0] == logs[1] != logs[2]


def test_torchs_random_state_is_given_back_also_after_a_failure(method, base, images):
    before = torch.random.get_rng_state()
    with pytest.raises(CutOff):
        train(method, base, images, 0, cut_off_after(2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_seed_is_a_pure_function_of_its_path():
    assert seed_for(7, "stage", 41, "noise") == seed_for(7, "stage", 41, "noise")
    assert len({seed_for(*what) for what in [(7, "a", 1), (7, "a", 2), (8, "a", 1), (7, "b", 1)]}) == 4
    assert 0 <= seed_for("anything") < 2**63
    one, same = (torch.randn(3, generator=generator_for(1, "x")) for _ in range(2))
    assert torch.equal(one, same)


# -- parts of a batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "size", "parts"),
    [(None, 4, [(0, 4)]), (4, 4, [(0, 4)]), (8, 4, [(0, 4)]), (3, 4, [(0, 3), (3, 4)]), (1, 2, [(0, 1), (1, 2)])],
)
def test_parts_cover_a_batch_in_order(rows, size, parts):
    assert [(part.start, part.stop) for part in RowsAtOnce(rows).parts(size)] == parts


@pytest.fixture
def small_card(base, monkeypatch):
    """A card with memory for so many rows of the U-Net; how many rows it was asked for."""

    def make(room: int) -> list[int]:
        asked, denoise = [], base.denoise

        def denoising(x_t, *arguments):
            asked.append(len(x_t))
            if len(x_t) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return denoise(x_t, *arguments)

        monkeypatch.setattr(base, "denoise", denoising)
        return asked

    return make


class FourRows(TwoStages):
    def stages(self):
        return [replace(stage, batch_size=4) for stage in super().stages()]


def test_automatic_parts_are_halved_until_they_fit_and_stay_so_and_that_is_said(
    base, concept, images, small_card, caplog
):
    expected, at_once = FourRows(base, concept), RowsAtOnce.of("auto")
    train(expected, base, images, seed=0, at_once=RowsAtOnce(1))
    method, asked = FourRows(base, concept), small_card(1)
    rows = train(method, base, images, seed=0, at_once=at_once)
    assert asked == [4, 2] + [1] * 4 * 5
    assert at_once.rows == 1 and [row["step"] for row in rows] == [0, 1, 2, 0, 1]
    said = [record.getMessage() for record in caplog.records if record.name == micro_batches.__name__]
    assert ["4 rows at once" in said[0] and "goes on with 2" in said[0], "goes on with 1" in said[1]] == [True, True]
    assert len(said) == 2
    assert equal_bits(method.state_dict(), expected.state_dict())


def test_of_what_failed_halfway_nothing_is_counted_twice(base, concept, images, monkeypatch):
    """The card is full at the third of four rows, when two have left their gradient."""
    expected, method, denoise, asked = FourRows(base, concept), FourRows(base, concept), base.denoise, []
    train(expected, base, images, seed=0, at_once=RowsAtOnce(1))

    def denoising(x_t, *arguments):
        asked.append(len(x_t))
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(x_t, *arguments)

    monkeypatch.setattr(base, "denoise", denoising)
    train(method, base, images, seed=0, at_once=RowsAtOnce(2, automatic=True))
    assert asked[:3] == [2, 2, 1]
    assert equal_bits(method.state_dict(), expected.state_dict())


@pytest.mark.parametrize("asked", [None, 2, "auto"])
def test_what_cannot_be_halved_fails_as_it_did(asked, base, concept, images, small_card):
    small_card(0)
    with pytest.raises(torch.OutOfMemoryError):
        train(FourRows(base, concept), base, images, seed=0, at_once=RowsAtOnce.of(asked))


def test_a_later_penalty_is_computed_when_the_predictions_graph_is_gone(base, concept, images):
    seen = []

    class Later(TwoStages):
        def stages(self):
            def later(step):
                seen.append((step.prediction.requires_grad, len(step.maps), self.direction.grad is not None))
                return {"later": 0.5 * step.share * self.direction.pow(2).sum()}

            return [replace(super().stages()[0], later_penalty=later)]

    method = Later(base, concept)
    nn.init.ones_(method.direction)
    rows = train(method, base, images, seed=0)
    assert seen == [(False, 0, True)] * 3
    assert rows[0]["later"] == pytest.approx(0.5 * 32) and list(rows[0])[2:5] == ["diffusion", "length", "later"]


def test_a_stage_may_put_less_into_the_base_model_than_the_method(base, concept, images):
    attached = []

    class Watched(TwoStages):
        def stages(self):
            first, second = super().stages()
            return [replace(first, attach=lambda base: self._as("stage")), second]

        def attach(self, base):
            return self._as("method")

        @contextmanager
        def _as(self, name):
            attached.append(name)
            yield
            attached.append(f"end of {name}")

    train(Watched(base, concept), base, images, seed=0)
    assert attached == ["stage", "end of stage", "method", "end of method"]


@pytest.mark.parametrize("longest", [0.5, 5.0 - 5e-7, 5.0, 7.0, math.inf])
def test_gradients_are_shortened_to_the_bit_as_torch_does_it(longest):
    """Longer, as long, shorter, and any length."""
    own, torchs = ([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3, 1))] for _ in range(2))
    for weights in (own, torchs):
        weights[0].grad, weights[1].grad = torch.tensor([3.0]), torch.tensor([[0.0], [4.0], [0.0]])
    assert clipped(own, longest) == torch.nn.utils.clip_grad_norm_(torchs, longest) == 5
    for one, other in zip(own, torchs, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)
