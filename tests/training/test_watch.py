"""A training that is watched learns what it would have learned, sees what there is, and may end sooner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from personalize_core.errors import InputError
from personalize_core.methods.adaptive import Adaptive
from personalize_core.methods.interface import Stage
from personalize_core.training.checkpoints import Checkpoints
from personalize_core.training.loop import train
from personalize_core.training.watch import Plan, Probed, Probes, Watch
from personalize_core.training.watcher import Watched
from tests.conftest import equal_bits, tiny_base
from tests.training.test_loop import CutOff, TwoStages, cut_off_after


@pytest.fixture
def base():
    return tiny_base()


class Scripted:
    """A probe that says what it was told to, and what the method was when it looked."""

    def __init__(self, identity=(), images=2):
        self.identity, self.images, self.methods = list(identity), images, []

    def __call__(self, method):
        self.methods.append(method)
        number = method.steps_seen.sum()  # known to a resumed training too
        score = self.identity[int(number)] if self.identity else float(method.direction.detach().norm())
        pictures = torch.full((self.images + 1, 2, 2, 3), int(number) % 256, dtype=torch.uint8)
        method.eval()
        return Probed(pictures, {"identity": [score, score + 0.01], "text": [0.25, 0.25], "copying": [score, score]})


def watch(method, base, images, probe=None, share=0.5, adaptive=None, heard=None):
    probes = Probes(probe, images=2, sampling_steps=1) if probe else None
    return Watch(method, base, images, 3, probes, share, adaptive, heard)


class Counting(TwoStages):
    """One stage of as many steps as asked for; it counts them."""

    steps = 12

    def stages(self):
        def after(index):
            self.steps_seen[0] += 1

        return [Stage("direction", self.steps, 2, [{"params": [self.direction], "lr": 1e-2}], after_step=after)]


class Long(Counting):
    steps = 60


# -- when it looks ---------------------------------------------------------------------------------------------


def test_a_plan_spends_what_it_may():
    """100 steps of 4 rows cost 3 * 4 * 100 = 1,200 passes; the loss of 8 rows is 8."""
    plan = Plan.of([(100, 4, 8)], passes=30, loss=0.02, probes=0.15)
    assert plan.every == [34]  # 8 / (0.02 * 12) = 33.3: 8 passes in each 34 * 12 = 408 are 0.0196
    assert plan.probes == [[0, 20, 40, 60, 80, 100]]  # 0.15 * 1,200 / 30 = 6


def test_probes_lie_evenly_over_all_stages_and_each_moment_belongs_to_one():
    plan = Plan.of([(10, 1, 8), (0, 1, 8), (30, 1, 8)], passes=12, loss=0.1, probes=0.5)
    # 0.5 * 3 * 40 / 12 = 5, on a line of two stages of one length: at 0, 0.5, 1, 1.5 and 2
    assert plan.probes == [[0, 5], [], [0, 15, 30]]


def test_a_short_stage_has_as_many_probes_as_a_long_one():
    """Else no share would be large enough to decide by them when a short last stage has learned."""
    plan = Plan.of([(300, 4, 8), (60, 4, 8), (30, 4, 8)], passes=20, loss=0.1, probes=0.4)
    assert [len(moments) for moments in plan.probes] == [12, 12, 12]
    first, middle, last = plan.probes
    assert first[0] == 0 and last[-1] == 30 and max(first) < 300 and max(middle) < 60


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_stage_of_few_steps_has_no_moment_twice_and_none_behind_its_end(steps):
    plan = Plan.of([(steps, 8, 8), (100, 8, 8)], passes=2, loss=0.1, probes=0.5)
    assert plan.probes[0] == list(range(steps)) and len(plan.probes[1]) == 12


@pytest.mark.parametrize(("passes", "probes"), [(0, 0.5), (1000, 0.5), (30, 0.0)])
def test_there_are_no_probes_where_there_is_nothing_to_spend(passes, probes):
    plan = Plan.of([(10, 4, 8)], passes, loss=0.0, probes=probes)
    assert plan.probes == [[]] and plan.every == [11]  # behind no step


def test_there_are_never_more_probes_than_can_be_looked_at():
    assert len(Plan.of([(1000, 4, 8)], passes=1, loss=0.1, probes=0.5).probes[0]) == 12


# -- what it sees ----------------------------------------------------------------------------------------------


def test_the_loss_on_fixed_inputs_is_of_the_method_as_it_is(base, concept, images):
    method = Counting(base, concept)
    seen, inputs = watch(method, base, images), []
    original = base.denoise

    def denoise(x_t, t, context, maps=None, rows=None):
        if not torch.is_grad_enabled():
            inputs.append((x_t.clone(), t.clone()))
        return original(x_t, t, context, maps, rows)

    base.denoise = denoise
    rows = train(method, base, images, 3, watcher=seen)
    assert [one["step"] for one in seen.losses] == [
        0,
        11,
        12,
    ]  # 8 rows / (0.25 * 0.5 * 3 * 2): every 11th, and the last
    assert [row["step"] + 1 for row in rows if "fixed_inputs" in row] == [11, 12]
    assert rows[-1]["fixed_inputs"] == pytest.approx(sum(seen.losses[-1]["values"]))
    one, other, last = (inputs[start : start + 4] for start in (0, 4, 8))  # 8 rows, 2 at once as in a step
    assert len(inputs) == 12 and all(torch.equal(a[0], b[0]) for a, b in zip(one, last, strict=True))
    t = torch.cat([t for _, t in one])
    assert t.tolist() == [62, 187, 312, 437, 562, 687, 812, 937]  # the middles of eight equal parts
    assert seen.losses[0]["values"] != seen.losses[-1]["values"]


def test_the_loss_on_fixed_inputs_is_the_mean_squared_error_of_what_the_unet_predicts(base, concept, images):
    method = Counting(base, concept)
    seen, errors, given = watch(method, base, images), [], []
    add_noise, denoise = base.scheduler.add_noise, base.denoise

    def noised(latents, noise, t):
        given.append(noise)
        return add_noise(latents, noise, t)

    def predicted(x_t, t, context, maps=None, rows=None):
        prediction = denoise(x_t, t, context, maps, rows)
        if not torch.is_grad_enabled():
            noise = given[-1][rows].double().numpy()
            errors.append(((prediction.double().numpy() - noise) ** 2).mean(axis=(1, 2, 3)))
        return prediction

    base.scheduler.add_noise, base.denoise = noised, predicted
    train(method, base, images, 3, watcher=seen)
    by_hand = np.concatenate(errors).reshape(-1, 8) / 8  # a mean over the rows
    np.testing.assert_allclose([one["values"] for one in seen.losses], by_hand, rtol=1e-5)


def test_every_probe_is_behind_its_step_and_the_end_is_seen(base, concept, images):
    method, probe = Counting(base, concept), Scripted()
    seen = watch(method, base, images, probe)
    train(method, base, images, 3, watcher=seen)
    # 0.375 * 3 * 2 * 12 = 27 passes, and a probe is 2 * (2 + 4) = 12: two of them
    assert [(one["stage"], one["step"]) for one in seen.seen] == [("direction", 0), ("direction", 12)]
    assert seen.ended == {"direction": {"steps": 12, "of": 12, "learned": False, "kept": 12}}
    assert seen.seen[1]["metrics"]["identity"][0] == pytest.approx(float(method.direction.detach().norm()))


# -- what it leaves alone --------------------------------------------------------------------------------------


def test_who_is_watched_learns_the_same_bits(base, concept, images):
    alone, watched = TwoStages(base, concept), TwoStages(base, concept)
    expected = train(alone, base, images, 3)
    rows = train(watched, base, images, 3, watcher=watch(watched, base, images, Scripted()))
    assert equal_bits(watched.state_dict(), alone.state_dict())
    assert [{k: v for k, v in row.items() if k != "fixed_inputs"} for row in rows] == expected


# -- ending sooner ---------------------------------------------------------------------------------------------


class Settling(Counting):
    """Its direction moves in its first four steps alone."""

    kept: torch.Tensor

    def __init__(self, base, concept) -> None:
        super().__init__(base, concept)
        self.register_buffer("kept", torch.zeros(base.text_width))

    def stages(self):
        def after(index):
            self.steps_seen[0] += 1
            if index > 3:
                with torch.no_grad():
                    self.direction.copy_(self.kept)
            else:
                self.kept.copy_(self.direction.detach())

        group = {"params": [self.direction], "lr": 1.0}
        return [Stage("direction", 40, 8, [group], after_step=after)]


def test_a_stage_ends_when_its_loss_has_settled(base, concept, images):
    method = Settling(base, concept)
    seen = watch(method, base, images, adaptive=Adaptive(stop="loss", window=0.5, threshold=0.01, share=0.5))
    train(method, base, images, 3, watcher=seen)
    assert seen.plan.every == [1]  # 8 / (0.75 * 0.5 * 24) < 1
    means = [np.mean(one["values"]) for one in seen.losses]
    stopped = seen.losses[-1]["step"]
    assert seen.ended["direction"] == {"steps": stopped, "of": 40, "learned": True, "kept": stopped}
    assert method.steps_seen[0] == stopped < 40
    # half of 40 steps, with a loss after each
    ratios = [np.var(means[n - 20 : n]) / np.var(means[:n]) for n in range(20, len(means) + 1)]
    assert all(ratio >= 0.01 for ratio in ratios[:-1]) and ratios[-1] < 0.01


def adaptive_by_probes(**changes):
    return Adaptive(**{"stop": "probes", "patience": 2, "by": "identity", "share": 0.5} | changes)


def test_a_stage_ends_when_probes_gain_no_more_and_the_best_is_kept(base, concept, images):
    method = Long(base, concept)
    scores = [0.1] * 61
    scores[10:] = [0.5] * 51
    states = {}

    class Remembering(Scripted):
        def __call__(self, method):
            states[int(method.steps_seen.sum())] = method.direction.detach().clone()
            return super().__call__(method)

    seen = watch(method, base, images, Remembering(scores), adaptive=adaptive_by_probes(keep="best"))
    train(method, base, images, 3, watcher=seen)
    moments = seen.plan.probes[0]
    best = next(step for step in moments if step >= 10)
    ended = moments[moments.index(best) + 2]
    assert seen.ended["direction"] == {"steps": ended, "of": 60, "learned": True, "kept": best}
    assert torch.equal(method.direction.detach(), states[best])
    assert not torch.equal(states[best], states[ended])


@pytest.mark.parametrize("level", [0.0, -0.01])
def test_what_never_gained_anything_has_not_learned(level, base, concept, images):
    """As where the balance of all images is 0, because they are not like the concept at all yet."""
    method, flat = Long(base, concept), [0.1 + level * (n > 0) for n in range(61)]
    seen = watch(method, base, images, Scripted(flat), adaptive=adaptive_by_probes())
    train(method, base, images, 3, watcher=seen)
    assert len(seen.plan.probes[0]) > 5 and seen.ended["direction"]["steps"] == 60


def test_what_has_learned_nothing_yet_is_never_the_best(base, concept, images):
    method, falling = Long(base, concept), [1 - 0.01 * n for n in range(61)]
    adaptive = adaptive_by_probes(stop="never", keep="best")
    seen = watch(method, base, images, Scripted(falling), adaptive=adaptive)
    train(method, base, images, 3, watcher=seen)
    assert seen.plan.probes[0][0] == 0 and seen.ended["direction"]["kept"] == seen.plan.probes[0][1] > 0


def test_what_a_stage_before_has_learned_may_be_the_best(base, concept, images):
    class TwoLong(Long):
        def stages(self):
            (stage,) = super().stages()
            return [replace(stage, name="first"), stage]

    method, falling = TwoLong(base, concept), [1 - 0.01 * abs(n - 60) for n in range(121)]
    adaptive = adaptive_by_probes(stop="never", keep="best")
    seen = watch(method, base, images, Scripted(falling), adaptive=adaptive)
    train(method, base, images, 3, watcher=seen)
    best = min(seen.plan.probes[1])
    assert seen.ended["direction"]["kept"] == best < 10


def test_what_is_kept_may_be_the_last(base, concept, images):
    method, rising = Long(base, concept), [0.01 * n for n in range(61)]
    seen = watch(method, base, images, Scripted(rising), adaptive=adaptive_by_probes(stop="never", keep="best"))
    train(method, base, images, 3, watcher=seen)
    assert seen.ended["direction"] == {"steps": 60, "of": 60, "learned": False, "kept": 60}


BY_LOSS = {"stop": "loss", "window": 0.2, "threshold": 0.05}


@pytest.mark.parametrize(
    ("Kind", "how", "rows"),  # the first ends at step 24, the second at 36 and with 13 losses, of which 12 decide
    [*((Long, {}, rows) for rows in (1, 5, 6, 7, 12, 23)), *((Settling, BY_LOSS, rows) for rows in (1, 6, 12, 33, 35))],
)
def test_wherever_it_was_cut_off_it_sees_decides_and_keeps_the_same(Kind, how, rows, base, concept, images, tmp_path):
    scores = [0.1 + 0.4 * (n > 8) for n in range(61)]
    adaptive = adaptive_by_probes(keep="best", **how)
    undisturbed = Kind(base, concept)
    expected = watch(undisturbed, base, images, Scripted(scores), adaptive=adaptive)
    log = train(undisturbed, base, images, 3, watcher=expected)
    assert rows < len(log) < undisturbed.stages()[0].steps

    checkpoints = Checkpoints(tmp_path, "this run", every_seconds=0)
    first, resumed = Kind(base, concept), Kind(base, concept)
    with pytest.raises(CutOff):
        cut = watch(first, base, images, Scripted(scores), adaptive=adaptive)
        train(first, base, images, 3, cut_off_after(rows), checkpoints, watcher=cut)
    again = watch(resumed, base, images, Scripted(scores), adaptive=adaptive)
    assert train(resumed, base, images, 3, checkpoints=checkpoints, watcher=again) == log
    assert equal_bits(resumed.state_dict(), undisturbed.state_dict())
    assert (again.losses, again.seen, again.ended) == (expected.losses, expected.seen, expected.ended)
    assert all(torch.equal(one, other) for one, other in zip(again.pictures, expected.pictures, strict=True))


# -- who hears of it -------------------------------------------------------------------------------------------


class Heard(list):
    """What was heard of each probe; the one behind `enough` of the training is one too many."""

    def __init__(self, enough=2.0):
        self.enough = enough

    def __call__(self, done, metrics):
        self.append((done, metrics["identity"][0]))
        if done >= self.enough:
            raise CutOff


def test_each_probe_is_told_with_how_much_of_the_training_was_done(base, concept, images):
    method, heard = Long(base, concept), Heard()
    seen = watch(method, base, images, Scripted([n / 100 for n in range(61)]), heard=heard)
    train(method, base, images, 3, watcher=seen)
    steps = [one["step"] for one in seen.seen]
    assert len(steps) > 4 and heard == [(step / 60, step / 100) for step in steps]


def test_of_several_stages_all_steps_count(base, concept, images):
    method, heard = TwoStages(base, concept), Heard()
    seen = watch(method, base, images, Scripted(), heard=heard)
    seen.begin(method.stages(), Watched())
    first, second = method.stages()
    seen._tell({"stage": second.name, "step": second.steps, "metrics": {"identity": [0.5]}})
    seen._tell({"stage": second.name, "step": 0, "metrics": {"identity": [0.5]}})
    assert heard == [(1.0, 0.5), (first.steps / (first.steps + second.steps), 0.5)]


@pytest.mark.parametrize("rows", [1, 20, 31, 40])
def test_who_ends_a_training_by_a_probe_ends_it_there_wherever_it_was_cut_off(rows, base, concept, images, tmp_path):
    def run(checkpoints, log, heard):
        method = Long(base, concept)
        seen = watch(method, base, images, Scripted([n / 100 for n in range(61)]), heard=heard)
        with pytest.raises(CutOff):
            train(method, base, images, 3, log, checkpoints, watcher=seen)

    undisturbed, first, again = Heard(0.5), Heard(0.5), Heard(0.5)
    run(None, lambda row: None, undisturbed)
    assert len(undisturbed) > 1 and undisturbed[-2][0] < 0.5 <= undisturbed[-1][0]
    checkpoints = Checkpoints(tmp_path, "this run", every_seconds=0)
    run(checkpoints, cut_off_after(rows), first)
    run(checkpoints, lambda row: None, again)
    assert again == undisturbed


# -- what cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adaptive", "said"),
    [
        (
            Adaptive(stop="loss", share=0.01),
            "0 values .* window: 0.3 needs more than 12; raise share",
        ),
        (adaptive_by_probes(patience=9), "2 probes in stage 'direction', and it takes 11"),
        (Adaptive(stop="never", keep="best", share=0.05), "0 probes in stage 'direction', and it takes 2"),
    ],
)
def test_a_share_that_is_too_small_to_decide_by_is_refused_before_the_first_step(adaptive, said, base, concept, images):
    method, heard = Counting(base, concept), []
    with pytest.raises(InputError, match=said):
        train(method, base, images, 3, heard.append, watcher=watch(method, base, images, Scripted(), adaptive=adaptive))
    assert not heard


def test_how_every_method_is_trained_is_no_choice():
    with pytest.raises(Exception, match="take `adaptive` out"):
        Adaptive(stop="never", keep="last")


def test_a_stage_takes_its_least_steps_and_says_when_it_has_ended(base, concept, images):
    ended = []

    class Patient(Settling):
        def stages(self):
            (stage,) = super().stages()
            return [replace(stage, least_steps=20, at_end=lambda: ended.append(int(self.steps_seen[0])))]

    method = Patient(base, concept)
    seen = watch(method, base, images, adaptive=Adaptive(stop="loss", window=0.2, threshold=0.05, share=0.5))
    train(method, base, images, 3, watcher=seen)
    assert seen.ended["direction"]["steps"] == 20 and ended == [20]  # it had settled long before
