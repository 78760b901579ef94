"""CoRe learns the embedding under context regularization, then the whole U-Net without it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError

from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods.core.method import Config, CoRe, prompt_set
from personalize_core.methods.shared.context_regularizer import PromptPair, context_losses
from personalize_core.training.checkpoints import Checkpoints
from personalize_core.training.loop import diffusion_loss, train
from tests.artifacts.test_export import check_same, fresh_pipeline
from tests.conftest import EVERY_STEP, a_step, disturbed, equal_bits, sample_latents, tiny_base

SHORT: dict[str, Any] = {
    "embedding_steps": 2,
    "embedding_batch_size": 2,
    "unet_steps": 2,
    "unet_batch_size": 2,
    "prompt_set": "core_mini",
}


def short(**chosen: Any) -> Config:
    """Two steps a stage, two rows a step."""
    return Config(**(SHORT | chosen))


@pytest.fixture
def base() -> BaseModel:
    """Of one kind of projection, for nothing here touches them; tests/every_method has both."""
    return tiny_base()


@pytest.fixture
def make(base, concept) -> Any:
    return lambda **chosen: CoRe(short(**chosen), base, concept)


# -- the recipe ------------------------------------------------------------------------------------------------


def test_the_recipe_is_the_papers():
    """docs/methods.md#core, with the code's reading of the losses."""
    c = Config()
    assert (c.embedding_lr, c.embedding_steps, c.embedding_batch_size) == (5e-3, 300, 6)
    assert (c.unet_lr, c.unet_steps, c.unet_batch_size) == (2e-6, 1000, 4)
    assert (c.cer_weight, c.car_weight, c.rescale, c.rescaled_steps) == (1.5e-4, 0.05, True, (120, 180))
    assert (c.cer_axis, c.car_pool, c.car_batch, c.prompt_set) == ("token", "layer", "sum", "by_kind")
    assert (c.class_token_rule, c.rotate) == ("last", True)


def test_the_placeholder_stands_alone_in_both_stages(make, images):
    method = make()
    assert method.say("a photo of a {}") == "a photo of a <v>"
    assert method.batch(images, 3, torch.Generator()).prompts == ["a photo of a <v>"] * 3


def test_each_stage_trains_what_the_paper_says_with_its_own_settings(make, base):
    method = make()
    embedding, unet = method.stages()
    assert (embedding.name, unet.name) == ("embedding", "unet")
    assert embedding.param_groups == [{"params": [method.embedding.vector], "lr": 5e-3}]
    assert {name for name, _ in method.unet.items()} == {name for name, _ in base.unet.named_parameters()}
    assert unet.param_groups == [{"params": list(method.unet.parameters()), "lr": 2e-6}]
    assert {stage.max_gradient_norm for stage in method.stages()} == {math.inf}


def test_in_each_stage_only_its_own_tensors_change(make, base, images):
    method = make(embedding_lr=0.1, unet_lr=1e-3)
    states = {"start": {name: tensor.clone() for name, tensor in method.state_dict().items()}}

    def log(row):
        states[row["stage"]] = {name: tensor.clone() for name, tensor in method.state_dict().items()}

    rows = train(method, base, images, 0, log)
    first = {name for name, t in states["start"].items() if not torch.equal(t, states["embedding"][name])}
    second = {name for name, t in states["embedding"].items() if not torch.equal(t, states["unet"][name])}
    assert first == {"embedding.vector", "norm"}
    assert second == {name for name in states["start"] if name.startswith("unet.")}
    context = {"context_embedding", "context_attention"}
    assert [set(row) & context for row in rows] == [context] * 2 + [set()] * 2  # no such loss in the second stage


@pytest.mark.parametrize(("without", "left"), [("embedding", "unet"), ("unet", "embedding")])
def test_a_stage_of_no_steps_is_left_out_and_the_other_stays_as_it_is(without, left, make, base, images):
    method, whole = make(**{f"{without}_steps": 0}), make()
    (stage,), (kept,) = method.stages(), (stage for stage in whole.stages() if stage.name == left)
    assert (stage.name, stage.steps, stage.batch_size) == (kept.name, kept.steps, kept.batch_size)
    train(method, base, images, seed=0)
    if without == "embedding":
        assert torch.equal(method.embedding.vector, base.word_embedding("dog"))
    else:
        assert list(method.unet.items()) == []


def test_the_diffusion_loss_has_a_finite_gradient_on_the_embedding(make, base, images):
    method = make()
    with method.attach(base):
        (gradient,) = torch.autograd.grad(diffusion_loss(a_step(method, base, images)), method.embedding.vector)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_it_starts_from_the_class_noun_by_the_token_that_is_chosen(base):
    bear = Concept("b", "<b>", "teddy bear")
    start = {
        rule: CoRe(short(class_token_rule=rule), base, bear).embedding.vector for rule in ("last", "first", "mean")
    }
    assert torch.equal(start["last"], base.word_embedding("bear"))
    assert torch.equal(start["first"], base.word_embedding("teddy"))
    torch.testing.assert_close(start["mean"], (base.word_embedding("bear") + base.word_embedding("teddy")) / 2)


def test_concept_images_are_turned_and_mirrored_unless_the_paper_is_followed():
    """How the concept images are prepared, as the code does it."""
    recipe = Config().preprocessing
    assert (recipe.geometry, recipe.interpolation, recipe.flip) == ("rotate", "bilinear", True)
    plain = Config(rotate=False).preprocessing
    assert (plain.geometry, plain.interpolation, plain.flip) == ("crop", "bilinear", False)


# -- context regularization ------------------------------------------------------------------------------------


def test_the_penalty_is_the_two_losses_under_the_noisy_latents_of_the_diffusion_loss(make, base, images):
    method = disturbed(make())
    with method.attach(base), torch.no_grad():
        step = a_step(method, base, images)
        state = step.generator.get_state()
        losses = method.stages()[0].later_penalty(step)
        step.generator.set_state(state)
        template = method.templates[int(torch.randint(len(method.templates), (), generator=step.generator))]
        pair = PromptPair.of(base, method.concept, template, "<v>")
        context = base.encode([pair.concept_prompt] * 2, method.concept, method.embedding.vector)
        expected = context_losses(method.config, base, method.concept, pair, lambda t: context, step.x_t, step.t)
    assert losses == expected and set(losses) == {"context_embedding", "context_attention"}


def test_a_constrained_concept_is_compared_with_its_class_noun_alone(base, images):
    """By hand: cosine of the placeholder's features with the noun's, and the squared difference of their attention."""
    bear = Concept("b", "<b>", "teddy bear")
    method = disturbed(CoRe(short(regularized="concept", prompt_set="training_prompt"), base, bear))
    with method.attach(base), torch.no_grad():
        step = a_step(method, base, images)
        losses = method.context_penalty(step)
        said = base.encode(["a photo of a <b>"] * 2, bear, method.embedding.vector)
        named = base.encode(["a photo of a teddy bear"] * 2, bear)
        maps, class_maps = AttentionMaps(), AttentionMaps()
        base.denoise(step.x_t, step.t, said, maps)
        base.denoise(step.x_t, step.t, named, class_maps)
    cosine = torch.cosine_similarity(
        said.hidden[0, 5], named.hidden[0, 6], dim=0
    )  # begin, a photo of a, then the concept
    torch.testing.assert_close(losses["context_embedding"], method.config.cer_weight * (1 - cosine))
    squares = [
        (maps[layer][row, :, :, 5].mean() - class_maps[layer][row, :, :, 6].mean()) ** 2
        for layer in base.layers
        for row in range(2)
    ]
    expected = method.config.car_weight * sum(squares) / len(base.layers)
    torch.testing.assert_close(losses["context_attention"], torch.as_tensor(expected), rtol=1e-4, atol=0)


def test_one_template_serves_the_whole_batch_and_others_the_other_steps(make, base, images, monkeypatch):
    method, said = make(), []
    encode = base.encode
    monkeypatch.setattr(base, "encode", lambda prompts, *args: said.append(list(prompts)) or encode(prompts, *args))
    with method.attach(base), torch.no_grad():
        for index in range(6):
            method.stages()[0].later_penalty(a_step(method, base, images, index=index))
    training, ours, others = said[::3], said[1::3], said[2::3]
    assert training == [["a photo of a <v>"] * 2] * 6
    for mine, class_prompts in zip(ours, others, strict=True):
        assert len(set(mine)) == len(set(class_prompts)) == 1 and len(mine) == len(class_prompts) == 2
        assert class_prompts[0] == mine[0].replace("<v>", "dog")
        assert mine[0].replace("<v>", "{}") in method.templates
    assert len({prompts[0] for prompts in ours}) > 3


def test_templates_are_sampled_uniformly(make):
    method = make()
    count, generator = len(method.templates), torch.Generator().manual_seed(0)
    sampled = [int(torch.randint(count, (), generator=generator)) for _ in range(60 * count)]
    counts = np.bincount(sampled, minlength=count)
    assert counts.min() > 0 and ((counts - 60) ** 2 / 60).sum() < 90  # chi-squared, 49 degrees of freedom: p > 3e-4


def test_ablations_share_templates_and_noise(make, base, images, monkeypatch):
    """What is left out shifts no other draw."""
    seen = []
    for chosen in ({}, {"cer_weight": 0.0}, {"car_weight": 0.0}, {"rescale": False}):
        method = make(**chosen)
        templates: list[str] = []
        of = PromptPair.of
        monkeypatch.setattr(PromptPair, "of", lambda *args, of=of, t=templates: t.append(args[2]) or of(*args))
        with method.attach(base), torch.no_grad():
            step = a_step(method, base, images)
            method.stages()[0].later_penalty(step)
        monkeypatch.setattr(PromptPair, "of", of)
        seen.append((templates, step.x_t, step.t))
    for templates, x_t, t in seen[1:]:
        assert templates == seen[0][0] and torch.equal(x_t, seen[0][1]) and torch.equal(t, seen[0][2])


@pytest.mark.parametrize(
    ("chosen", "passes"),
    [({}, 3), ({"cer_weight": 0.0}, 3), ({"car_weight": 0.0}, 1), ({"cer_weight": 0.0, "car_weight": 0.0}, 1)],
)
def test_a_step_passes_the_unet_only_as_often_as_its_losses_need(chosen, passes, base, concept, images, monkeypatch):
    off = "cer_weight" in chosen and "car_weight" in chosen
    chosen = chosen | {"unet_steps": 0, "embedding_steps": 1} | ({"prompt_set": "by_kind"} if off else {})
    config = short(**chosen)
    calls, denoise = [], base.denoise
    monkeypatch.setattr(base, "denoise", lambda *args: calls.append(args) or denoise(*args))
    train(CoRe(config, base, concept), base, images, seed=0)
    assert len(calls) == passes
    assert all(torch.equal(x_t, calls[0][0]) and torch.equal(t, calls[0][1]) for x_t, t, *_ in calls)


# -- rescaling -------------------------------------------------------------------------------------------------


def simulated(method: CoRe, steps: int = 300) -> np.ndarray:
    """The embedding's norm after each of the published steps, numbered from 1; updates are random."""
    generator, norms = torch.Generator().manual_seed(0), [float(method.embedding.vector.detach().norm())]
    for index in range(steps):
        with torch.no_grad():
            method.embedding.vector += 0.1 * torch.randn(32, generator=generator)
        method.rescale(index)
        norms.append(float(method.embedding.vector.detach().norm()))
    return np.array(norms)


def test_the_norm_is_that_after_step_120_over_steps_121_to_180_and_free_elsewhere(base, concept):
    norms = simulated(CoRe(Config(), base, concept))
    np.testing.assert_allclose(norms[121:181], norms[120], rtol=1e-5)
    moves = np.abs(np.diff(norms)) / norms[:-1]
    assert np.median(moves[:120]) > 1e-3 and np.median(moves[180:]) > 1e-3 and moves[180] > 1e-5


def test_it_is_the_papers_norm_of_the_step_before(base, concept):
    """The paper resets the norm to that before each step of the window; by induction the two are the same."""
    method = CoRe(Config(), base, concept)
    norms = simulated(method)
    again = CoRe(Config(rescale=False), base, concept)
    generator, v = torch.Generator().manual_seed(0), again.embedding.vector.detach().clone()
    for step in range(1, 301):
        before = v.norm()
        v = v + 0.1 * torch.randn(32, generator=generator)
        if 120 < step <= 180:
            v = v * before / v.norm()
        assert float(v.norm()) == pytest.approx(norms[step], rel=1e-4)
    torch.testing.assert_close(v, method.embedding.vector.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "window"), [(300, (120, 180)), (60, (24, 36)), (10, (4, 6)), (3, (1, 2)), (2, (1, 2)), (1, (0, 1))]
)
def test_a_stage_of_any_length_is_rescaled_at_the_same_share_of_it(steps, window):
    assert Config(embedding_steps=steps).rescaled_steps == window


@pytest.mark.parametrize("steps", [300, 7, 2, 1])
@pytest.mark.parametrize("ablation", [name for name in Config.ablations if name.startswith("rescale_")])
def test_a_window_of_the_ablations_has_a_step_within_the_stage(ablation, steps):
    first, last = Config(embedding_steps=steps, **Config.ablations[ablation].changes).rescaled_steps
    assert 0 <= first < last <= steps


@pytest.mark.parametrize(
    ("ablation", "window"),
    [("rescale_early", (0, 120)), ("rescale_late", (180, 300)), ("rescale_throughout", (0, 300))],
)
def test_the_window_may_lie_elsewhere_and_begin_with_the_norm_of_the_class_noun(ablation, window, base, concept):
    method = CoRe(Config(**Config.ablations[ablation].changes), base, concept)
    start = base.word_embedding("dog").norm().item()
    norms = simulated(method)
    first, last = window
    np.testing.assert_allclose(norms[first : last + 1], norms[first], rtol=1e-5)
    assert first or norms[0] == pytest.approx(start, rel=1e-6)
    moves = np.abs(np.diff(norms)) / norms[:-1]
    assert all(np.median(part) > 1e-3 for part in (moves[:first], moves[last:]) if len(part))


def test_without_rescaling_no_norm_is_reset(base, concept):
    norms = simulated(CoRe(Config(rescale=False), base, concept), 200)
    assert np.abs(np.diff(norms[120:181])).min() > 0


def test_rescaling_keeps_the_direction_and_leaves_no_gradient(make):
    method = make(rescale_after=0.5, rescale_until=1.0)
    method.rescale(0)
    with torch.no_grad():
        method.embedding.vector += 1.0
    updated = method.embedding.vector.detach().clone()
    method.rescale(1)
    vector = method.embedding.vector
    torch.testing.assert_close(torch.cosine_similarity(vector, updated, dim=0), torch.tensor(1.0))
    assert vector.is_leaf and vector.requires_grad and not torch.equal(vector, updated)


def test_in_training_the_window_holds_and_the_optimizer_goes_on_from_its_own_moments(make, base, images):
    """Its moments are those of the run without rescaling up to the window's first step, which knows nothing of it."""
    norms, gradients = {}, {}
    for rescale in (True, False):
        window = {"rescale_after": 1 / 3, "rescale_until": 2 / 3} if rescale else {}
        method = make(embedding_steps=6, unet_steps=0, embedding_lr=0.1, rescale=rescale, **window)
        seen: list[float] = []
        rows = train(
            method, base, images, 0, lambda row, m=method, s=seen: s.append(m.embedding.vector.detach().norm().item())
        )
        norms[rescale], gradients[rescale] = seen, [row["gradient_norm"] for row in rows]
    np.testing.assert_allclose(norms[True][2:4], norms[True][1], rtol=1e-6)
    assert abs(norms[True][4] / norms[True][3] - 1) > 1e-5
    assert norms[True][:2] == norms[False][:2] and gradients[True][:3] == gradients[False][:3]
    assert all(abs(norms[False][i] / norms[False][i + 1] - 1) > 1e-6 for i in range(5))


def test_a_run_cut_off_within_the_window_resumes_to_the_same_bits(make, base, images, tmp_path):
    window = {"rescale_after": 1 / 3, "rescale_until": 5 / 6}
    chosen = {"embedding_steps": 6, "unet_steps": 0, "embedding_lr": 0.1, **window}
    whole = make(**chosen)
    expected = train(whole, base, images, seed=0)

    class CutOff(Exception):
        pass

    def cut_off(row):
        if row["step"] == 4:
            raise CutOff

    checkpoints = Checkpoints(tmp_path, stamp="this run", **EVERY_STEP)
    with pytest.raises(CutOff):
        train(make(**chosen), base, images, 0, cut_off, checkpoints)
    resumed = make(**chosen)
    assert train(resumed, base, images, 0, checkpoints=checkpoints) == expected
    assert equal_bits(resumed.state_dict(), whole.state_dict())


# -- prompt sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "one"),
    [
        ("core_animate", 97, "a {} singing melodiously in the tall oak tree"),
        ("core_inanimate", 103, "A {} embedded in a brick"),
        ("core_universal", 50, "A bronze sculpture of a {} in the garden"),
        ("core_mini", 50, "a pencil sketch of a {} under water"),
        ("training_prompt", 1, "a photo of a {}"),
    ],
)
def test_the_lists_are_the_released_ones_and_say_their_source(name, count, one):
    """97, 103 and 50 templates; the others are ours."""
    from personalize_core.concepts.prompt_lists import TRAINING, read_list

    templates, first = read_list(TRAINING / f"{name}.txt"), (TRAINING / f"{name}.txt").read_text("utf-8").split("\n")[0]
    assert len(templates) == count and one in templates
    assert first.startswith("#") and ("MIT" in first) == (name != "core_mini")


@pytest.mark.parametrize(
    ("class_noun", "expected"),
    [
        ("dog", "core_animate"),
        ("stuffed animal", "core_animate"),
        ("Teddy Bear", "core_animate"),
        ("doll", "core_animate"),
        ("action figure", "core_animate"),
        ("backpack", "core_inanimate"),
        ("wooden pot", "core_inanimate"),
        ("teapot", "core_inanimate"),
        ("catamaran", "core_inanimate"),
    ],
)
def test_the_prompts_follow_from_the_kind_of_thing(class_noun, expected):
    assert prompt_set(Config(), Concept("v", "<v>", class_noun)) == expected


def test_another_list_can_be_chosen_and_an_unknown_one_is_refused(make):
    assert make(prompt_set="training_prompt").templates == ["a photo of a {}"]
    assert len(make(prompt_set="core_universal").templates) == 50
    with pytest.raises(InputError, match="no prompt list 'core_things' in .*core_animate"):
        make(prompt_set="core_things")


def test_templates_that_this_base_model_has_no_room_for_are_left_out(base, concept, make, monkeypatch):
    """The tiny tokenizer spells unknown words, letter by letter."""
    short_enough, too_long = "a red {} in the jungle", "a {} " + "incomprehensibilities " * 4
    monkeypatch.setattr("personalize_core.methods.core.method.read_list", lambda path: [short_enough, too_long])
    assert make().templates == [short_enough]
    monkeypatch.setattr("personalize_core.methods.core.method.read_list", lambda path: [too_long])
    with pytest.raises(InputError, match="prompt_set = 'core_mini': this base model can read none of its prompts"):
        make()


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({"embedding_steps": 0, "unet_steps": 0}, "nothing would be learned"),
        ({"cer_weight": 0, "cer_axis": "feature"}, "shapes the context embedding loss, which is off"),
        ({"car_weight": 0, "car_pool": "all"}, "shape the context attention loss, which is off"),
        ({"cer_weight": 0, "car_weight": 0, "prompt_set": "core_mini"}, "for context regularization, which is off"),
        ({"rescale_after": 0.6, "rescale_until": 0.6}, "the rescaling window .* is empty"),
        ({"regularized": "concept", "cer_weight": 0, "car_weight": 0}, "says what context regularization keeps"),
        ({"rescale": False, "rescale_after": 0.2}, "set a window for rescaling, which is off"),
    ],
)
def test_choices_that_contradict_each_other_are_refused_in_a_sentence(chosen, why):
    with pytest.raises((InputError, ValidationError), match=why):
        Config(**chosen)


def test_every_ablation_of_the_register_can_be_configured(base, concept, images):
    """Without CER, CAR, rescaling, prompt set; and the paper's reading of the losses."""
    register: dict[str, dict[str, Any]] = {
        "without CER": {"cer_weight": 0.0},
        "without CAR": {"car_weight": 0.0},
        "without rescaling": {"rescale": False},
        "without a prompt set": {"prompt_set": "training_prompt"},
        "CER over features": {"cer_axis": "feature"},
        "CAR over all maps": {"car_pool": "all", "car_batch": "mean"},
    }
    seen = {}
    for variant, chosen in register.items():
        method = CoRe(short(unet_steps=0, embedding_lr=0.1, **chosen), base, concept)
        rows = train(method, base, images, seed=0)
        seen[variant] = {name: value for name, value in rows[-1].items() if name.startswith("context")}
    assert set(seen["without CER"]) == {"context_attention"} and set(seen["without CAR"]) == {"context_embedding"}
    for one, other in (("without CAR", "CER over features"), ("without CER", "CAR over all maps")):
        (name,) = seen[one]
        assert seen[one][name] != seen[other][name]


# -- elsewhere -------------------------------------------------------------------------------------------------


def test_the_embedding_in_the_vocabulary_samples_the_same_image(make, base):
    """The row of a token that stands in the placeholder's place, instead of the hook."""
    method = disturbed(make())
    expected = sample_latents(method, base, ["a photo of <v> on the beach"])
    with torch.no_grad():
        base.text_encoders.tables[0].weight[base.tokenizer.rare_id] = method.embedding.vector
    other = CoRe(short(), base, Concept("other", "<other>", "mug"))
    other.unet = method.unet
    assert torch.equal(sample_latents(other, base, ["a photo of sks on the beach"]), expected)


@pytest.mark.parametrize("linear", [False, True], ids=["convolutional", "linear"])
@pytest.mark.parametrize("steps", [0, 2], ids=["embedding alone", "with the U-Net"])
def test_the_export_samples_in_stock_diffusers_what_it_samples_here(linear, steps, tmp_path):
    base, concept = tiny_base(linear), Concept("v", "<v>", "teddy bear")
    method = disturbed(CoRe(short(unet_steps=steps), base, concept)).eval()
    how = method.export(base, tmp_path)
    assert 'pipe.load_textual_inversion("learned_embeds.safetensors")' in how and "'<v>'" in how
    changed = {}
    if steps:
        unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        changed = {"unet": unet.eval()}
    pipe = fresh_pipeline(base, **changed)
    pipe.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    check_same(pipe, "a photo of <v> on the beach", method, base)


def test_a_config_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().car_weight = 0.0  # type: ignore[misc]
