"""What is true of every method, whatever it learns. No test here knows a method's name."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from personalize_core import artifact
from personalize_core.base import BaseModel
from personalize_core.concept import Concept
from personalize_core.errors import InputError
from personalize_core.method import Method
from personalize_core.methods import METHODS, method_class
from personalize_core.parts import count
from personalize_core.train import Checkpoints, denoising_step, diffusion_loss, train
from tests.conftest import disturbed, draw, equal_bits, predict, snapshot, tiny_base, unpersonalized

STEPS = 3  # of every stage
ROWS = 2  # images of the concept in a step


def options_of(kind: Any) -> dict[str, tuple]:
    """Those options of a Config or Sampling that are a switch or a choice from a list, with their values."""
    hints = get_type_hints(kind)
    switches = {name: (False, True) for name, hint in hints.items() if hint is bool}
    return switches | {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method, with one choice of its switches and few steps, on one kind of base model."""

    name: str
    linear: bool
    chosen: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        kind = "linear" if self.linear else "convolutional"
        return "-".join([self.name, kind, *(f"{option}={value}" for option, value in self.chosen)])

    def base(self, **options) -> BaseModel:
        return tiny_base(self.linear, **options)

    def make(self, base: BaseModel, concept: Concept, seed: int = 0) -> Method:
        kind = method_class(self.name)
        fields = [field.name for field in dataclasses.fields(kind.Config)]
        short = {name: STEPS for name in fields if name.endswith("steps")}
        short |= {name: ROWS for name in fields if name.endswith("batch_size")}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return kind(kind.Config(**short, **dict(self.chosen)), base, concept)


def cases_of(name: str) -> list[Case]:
    """The defaults on both kinds of projection, then every other value of every switch, one at a time."""
    config = method_class(name).Config
    choices = [(option, value) for option, values in options_of(config).items() for value in values]
    others = [(option, value) for option, value in choices if getattr(config(), option) != value]
    return [Case(name, False), Case(name, True), *(Case(name, False, (other,)) for other in others)]


def samplings_of(name: str) -> list[dict[str, Any]]:
    """Every combination of a method's sampling options."""
    options = options_of(method_class(name).Sampling)
    return [dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*options.values())]


CONCEPT = Concept("v", "<v>", "dog")
DEFAULT = [Case(name, linear) for name in METHODS for linear in (False, True)]
ALL = [case for name in METHODS for case in cases_of(name)]
STARTING = [case for case in DEFAULT if method_class(case.name).starts_as_base_model]
LEARNING = [case for case in ALL if case.make(case.base(), CONCEPT).stages()]
SAMPLINGS = [(case, options) for case in DEFAULT for options in samplings_of(case.name)]

of_all = pytest.mark.parametrize("case", ALL, ids=str)
of_default = pytest.mark.parametrize("case", DEFAULT, ids=str)
of_starting = pytest.mark.parametrize("case", STARTING, ids=str)
of_learning = pytest.mark.parametrize("case", LEARNING, ids=str)
of_samplings = pytest.mark.parametrize(("case", "options"), SAMPLINGS, ids=str)


@pytest.fixture
def base(case) -> BaseModel:
    return case.base()


# -- before training ------------------------------------------------------------------------------------------


@of_starting
def test_before_the_first_step_the_answer_is_the_base_models(case, base, concept):
    method, context = case.make(base, concept), base.encode(["a photo of <v> dog", "a dog in the desert"], concept)
    expected = predict(base, context)
    with method.attach(base):
        torch.testing.assert_close(predict(base, context), expected, atol=1e-5, rtol=0)


@of_starting
def test_untrained_a_prompt_without_the_concept_is_drawn_as_by_the_base_model(case, base, concept):
    prompts = ["a photo of the desert", "a red mug"]
    expected = draw(unpersonalized(base, concept), base, prompts)
    torch.testing.assert_close(draw(case.make(base, concept), base, prompts), expected, atol=1e-5, rtol=0)


@of_all
def test_a_method_does_not_keep_the_base_model(case, base, concept):
    method = case.make(base, concept)
    parts = (base, base.unet, base.text_encoder, base.vae)
    assert not any(value is part for module in method.modules() for value in vars(module).values() for part in parts)


# -- training -------------------------------------------------------------------------------------------------


@of_learning
def test_training_changes_the_method_and_no_bit_of_the_base_model(case, base, concept, images):
    method, before = case.make(base, concept), snapshot(base)
    start = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    train(method, base, images, seed=0)
    assert not equal_bits(method.state_dict(), start)
    assert equal_bits(snapshot(base), before)  # every row of the vocabulary among it


@of_learning
def test_after_training_nothing_asks_for_gradients(case, base, concept, images):
    method = case.make(base, concept)
    train(method, base, images, seed=0)
    frozen = [method, base.unet, base.text_encoder, base.vae]
    assert not any(parameter.requires_grad for module in frozen for parameter in module.parameters())
    assert not method.training


@of_learning
def test_everything_a_method_learns_is_trained_in_some_stage(case, base, concept):
    method = case.make(base, concept)
    trained = {id(p) for stage in method.stages() for group in stage.param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in method.parameters()}


@of_learning
def test_each_loss_of_each_stage_moves_something_that_the_stage_trains(case, base, concept, images):
    method = disturbed(case.make(base, concept)).train()
    with method.attach(base):
        for stage in method.stages():
            trained = [parameter for group in stage.param_groups for parameter in group["params"]]
            step = denoising_step(method, base, images, stage, seed=0, index=0)
            for name, loss in {"diffusion": diffusion_loss(step), **stage.penalty(step)}.items():
                gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
                assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients), name


@of_learning
def test_every_learned_tensor_is_reached_by_training(case, base, concept, images):
    """A part that is attached in sampling but not in training would stay as it was."""
    method = disturbed(case.make(base, concept)).train()
    before = {name: parameter.clone() for name, parameter in method.named_parameters()}
    train(method, base, images, seed=0)
    unmoved = [name for name, parameter in method.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []


@of_learning
def test_the_same_seed_teaches_it_the_same_whatever_the_global_seed(case, base, concept, images):
    one, same, other = (case.make(base, concept) for _ in range(3))
    torch.manual_seed(1)
    log = train(one, base, images, seed=5)
    torch.manual_seed(2)
    assert train(same, base, images, seed=5) == log
    train(other, base, images, seed=6)
    assert equal_bits(one.state_dict(), same.state_dict())
    assert not equal_bits(one.state_dict(), other.state_dict())


@of_learning
def test_training_and_drawing_leave_torchs_global_random_state_alone(case, base, concept, images):
    method, before = case.make(base, concept), torch.random.get_rng_state()
    train(method, base, images, seed=0)
    draw(method, base, [method.say("a photo of {}")])
    assert torch.equal(torch.random.get_rng_state(), before)


class CutOff(Exception):
    """As a machine that goes down."""


@of_learning
def test_a_run_that_was_cut_off_resumes_to_the_same_bits(case, base, concept, images, tmp_path):
    undisturbed = case.make(base, concept)
    expected = train(undisturbed, base, images, seed=0)

    def cut_off(row):
        if row["step"] == 1:
            raise CutOff

    checkpoints = Checkpoints(tmp_path, stamp="this run", every_seconds=0)
    before = snapshot(base)
    with pytest.raises(CutOff):
        train(case.make(base, concept), base, images, 0, cut_off, checkpoints)
    assert equal_bits(snapshot(base), before)
    resumed, logged = case.make(base, concept, seed=99), []
    assert train(resumed, base, images, 0, logged.append, checkpoints) == expected
    assert logged[0]["step"] == 1  # it did go on, rather than start again
    assert equal_bits(resumed.state_dict(), undisturbed.state_dict())


@of_learning
def test_with_a_base_model_in_bfloat16_what_is_trained_stays_in_float32(case, concept, images):
    base = case.base(dtype=torch.bfloat16)
    method, before = case.make(base, concept), snapshot(base)
    start = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    rows = train(method, base, images, seed=0)
    assert {tensor.dtype for tensor in method.state_dict().values()} == {torch.float32}
    assert not equal_bits(method.state_dict(), start)
    assert all(torch.tensor(row["diffusion"]).isfinite() for row in rows)
    assert draw(method, base, [method.say("a photo of {}")]).isfinite().all()
    assert equal_bits(snapshot(base), before)


# -- after training -------------------------------------------------------------------------------------------


@of_all
def test_leaving_attach_restores_the_base_model_whatever_was_learned(case, base, concept):
    context = base.encode(["a photo of dog", "a dog in the desert"], concept)
    expected, before = predict(base, context), snapshot(base)
    with disturbed(case.make(base, concept)).attach(base):
        pass
    assert torch.equal(predict(base, context), expected)
    assert equal_bits(snapshot(base), before)


@of_all
def test_the_base_model_is_restored_when_the_block_fails(case, base, concept):
    context = base.encode(["a photo of dog"], concept)
    expected, before = predict(base, context), snapshot(base)
    with pytest.raises(CutOff), disturbed(case.make(base, concept)).attach(base):
        raise CutOff
    assert torch.equal(predict(base, context), expected)
    assert equal_bits(snapshot(base), before)


@of_all
def test_saved_and_restored_it_draws_the_same_picture(case, base, concept, tmp_path):
    method = disturbed(case.make(base, concept))
    artifact.save(tmp_path, case.name, method, base, seed=0)
    restored = artifact.restore(tmp_path, base)
    prompts = [method.say("a photo of {}"), "a red mug"]
    assert torch.equal(draw(restored, base, prompts), draw(method, base, prompts))
    assert restored.config == method.config and restored.concept == method.concept
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@of_learning
def test_each_learned_part_disturbed_alone_shows_in_the_picture(case, base, concept):
    method = disturbed(case.make(base, concept))
    prompts, learned = [method.say("a photo of {} in the red")], copy.deepcopy(method.state_dict())
    expected = draw(method, base, prompts)
    for part, module in method.named_children():
        if count(module):
            assert not torch.equal(draw(disturbed(method, starting=part, seed=12), base, prompts), expected), part
            method.load_state_dict(learned)


@of_learning
def test_each_learned_tensor_has_a_part_in_the_answer(case, base, concept):
    """By its gradient, as a picture is drawn; on latents so large that no layer has a single location."""
    base.unet.register_to_config(sample_size=16)
    method = disturbed(case.make(base, concept)).eval().requires_grad_(True)
    noise = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(4))
    with method.attach(base):
        context = method.condition(base, [method.say("a photo of {} in the red")])(torch.tensor([500]))
        answer = base.denoise(noise, torch.tensor([500]), context)
    gradients = torch.autograd.grad(answer.pow(2).sum(), list(method.parameters()), allow_unused=True)
    names = [name for name, _ in method.named_parameters()]
    assert [n for n, g in zip(names, gradients, strict=True) if g is None or not g.abs().sum() > 0] == []


@of_samplings
def test_a_row_does_not_depend_on_the_other_rows(case, options, base, concept):
    method = disturbed(case.make(base, concept))
    method.sampling = method.Sampling(**options)
    prompts = [method.say("a photo of {}"), method.say("red {} on the beach"), "the jungle"]
    together, first_two = draw(method, base, prompts), draw(method, base, prompts[:2])
    torch.testing.assert_close(together[:1], draw(method, base, prompts[:1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[:2], first_two, atol=1e-4, rtol=1e-4)


@of_all
def test_the_count_of_what_is_learned_is_the_artifacts(case, base, concept, tmp_path):
    method = case.make(base, concept)
    artifact.save(tmp_path, case.name, method, base, seed=0)
    assert artifact.read_json(tmp_path / "config.json")["parameters"] == count(method)
    remembered = {name for name, _ in method.named_buffers()}
    assert count(method) == sum(t.numel() for name, t in method.state_dict().items() if name not in remembered)


@of_all
def test_a_method_is_exported_in_a_public_format_or_refuses_and_writes_nothing(case, base, concept, tmp_path):
    method = case.make(base, concept)
    try:
        how = method.export(base, tmp_path)
    except InputError as refusal:
        assert "cannot be exported" in str(refusal)
        assert list(tmp_path.iterdir()) == []
    else:
        assert list(tmp_path.rglob("*.safetensors"))
        assert method.say("{}") in how or base.tokenizer.rare_word in how


@of_default
def test_a_method_says_the_concept_in_a_way_that_the_tokenizer_finds(case, base, concept):
    method = case.make(base, concept)
    context = method.condition(base, [method.say("a photo of {} on the beach")])(torch.tensor([500]))
    assert context.concept.any()
    assert len(context) == 1
