"""No operation mixes devices or types: every method, from its start to its import, with real numbers on a tiny model.

The base model is in bfloat16 under CUDA's autocast, as users run it. No test here knows a method's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from personalize_core.analyses import bare_placeholder, context_tokens, heat_maps, learned_embedding
from personalize_core.analyses.findings import NotDefined
from personalize_core.artifacts import proof, saving
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.images import ZOOMS, ConceptLatents
from personalize_core.errors import InputError
from personalize_core.methods import METHOD_NAMES, recipe_class
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.options import LAG, Refinement
from personalize_core.sampling.frozen import frozen
from personalize_core.sampling.sampler import guided, initial_noise, make_sampler, sample, step_generators
from personalize_core.sampling.several_concepts import Together
from personalize_core.sampling.test_time_optimization import ContextRefined
from personalize_core.training.checkpoints import Checkpoints, LogRow
from personalize_core.training.fixed_batch import fixed_batch_losses
from personalize_core.training.loop import train
from personalize_core.training.watch import Probed, Probes, Watch
from tests.card.card import pretended_card
from tests.conftest import EVERY_STEP, tiny_parts
from tests.every_method.cases import CONCEPT, LEARNING, TRAINED, Case, CutOff, samplings_of

pytestmark = pytest.mark.usefixtures("card", "short_checks")

NUMBERS: dict[str, Any] = {
    "scale": 1.0,
    "truncation": 16,
    "keep": 0.6,
    "reference": 1,
}  # of sampling options that are no choice
PLACES = [(0, 0), (1, 0)]


@dataclass(frozen=True)
class Learned:
    """A method that was trained on the card, and its artifact."""

    case: Case
    base: BaseModel
    start: Method  # as its training began
    method: Method
    images: ConceptLatents
    log: list[LogRow]
    reads: list[dict[str, Any] | None]  # what `WhileTraining` saw
    gradients: set[tuple[str, torch.dtype]]  # where they were, and in which type, at the end of each step
    moments: set[tuple[str, torch.dtype]]  # the optimizer's, likewise
    restored: Method
    folder: Path


def base_on_card(case: Case) -> BaseModel:
    parts = tiny_parts(case.kind == "linear")
    return BaseModel(name="tiny", revision="local", weights_hash="tiny", **parts, device="cuda", dtype=torch.bfloat16)


def images() -> ConceptLatents:
    """With as many views as any method asks for."""
    generator = torch.Generator().manual_seed(1)

    def moments(views: int) -> Tensor:
        mean = torch.randn(views, 4, 8, 8, generator=generator)
        return torch.stack([mean, torch.full_like(mean, 0.1)], dim=1)

    return ConceptLatents([moments(ZOOMS) for _ in range(2)], class_images=[moments(1) for _ in range(2)])


def of_one_worker(name: str) -> Any:
    """The tests of a method share its training, so they belong into one process."""
    return pytest.param(name, marks=pytest.mark.xdist_group(name))


def only(names: Iterable[str]) -> Any:
    """For a test that some methods alone can pass."""
    return pytest.mark.parametrize("learned", [*map(of_one_worker, names)], indirect=True)


def shares_images(name: str) -> bool:
    """Is it confined by LAG, and learns no embedding?"""
    recipe = recipe_class(name)
    return issubclass(recipe.Sampling, LAG) and not recipe().text_embeddings


@pytest.fixture(scope="module", params=[of_one_worker(name) for name in METHOD_NAMES])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, guarded: None) -> Learned:
    case, folder, given = Case(request.param, "linear"), tmp_path_factory.mktemp("artifact"), images()
    with pretended_card():
        base = base_on_card(case)
        method = case.make(base, CONCEPT)
        start = case.make(base, CONCEPT).requires_grad_(False).eval()
        fixed_batch_losses(method, base, given, seed=0)
        total = sum(stage.steps for stage in method.stages())
        look, reads = learned_embedding.WhileTraining(method.to(base.device), base, total), []
        look.every = 1
        gradients, moments = set(), set()

        def watch(optimizer: torch.optim.Optimizer, *call: Any) -> None:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            gradients.update((p.grad.device.type, p.grad.dtype) for p in trained if p.grad is not None)
            states = [value for p in trained for name, value in optimizer.state[p].items() if name != "step"]
            moments.update((state.device.type, state.dtype) for state in states)

        with hooked(register_optimizer_step_post_hook(watch)):
            log = train(method, base, given, 0, lambda row: reads.append(look(len(reads) + 1)))
        fixed_batch_losses(method, base, given, seed=0)
        saving.save(folder, case.name, method, base, 0)
        restored = saving.restore(folder, base)
    return Learned(case, base, start, method, given, log, reads, gradients, moments, restored, folder)


def test_what_is_trained_is_in_float32_on_the_card_beside_a_unet_in_bfloat16(learned):
    assert {(p.device.type, p.dtype) for p in learned.base.unet.parameters()} == {("cuda", torch.bfloat16)}
    parameters = list(learned.method.parameters())
    assert {p.dtype for p in parameters} <= {torch.float32}
    assert learned.gradients == ({("cuda", torch.float32)} if parameters else set())
    keeps_none = all(stage.optimizer for stage in learned.method.stages())  # an optimizer of its own need keep nothing
    assert learned.moments == (set() if keeps_none else learned.gradients)
    assert all(p.grad is None for p in parameters)
    assert len(learned.log) == sum(stage.steps for stage in learned.method.stages())
    assert all(torch.tensor(row["diffusion"]).isfinite() for row in learned.log)
    before = learned.start.state_dict()
    assert [n for n, p in learned.method.named_parameters() if torch.equal(p.cpu(), before[n].cpu())] == []


@only(name for name in METHOD_NAMES if name in TRAINED)
def test_who_is_watched_on_the_card_learns_the_same_bits(learned):
    """Also where a probe is sampled and the loss is taken between any two steps."""
    base = base_on_card(learned.case)
    method = learned.case.make(base, CONCEPT)

    def look(method: Method) -> Probed:
        said = [method.say("a photo of a {}"), "a photo of a dog"]
        # not by `sample`, which moves the method: beside a CPU build of torch that makes its parameters anew
        with frozen(method), method.attach(base):
            denoise = guided(base, method.condition(base, said), method.condition(base, ["", ""]), 2.0)
            latents = make_sampler("ddim", base)(denoise, initial_noise(base, 0, PLACES).to(base.device), 1)
        return Probed(base.decode(latents), {"identity": [0.0]})

    watch = Watch(method, base, learned.images, 0, Probes(look, images=1, sampling_steps=0), share=50.0)
    rows = train(method, base, learned.images, 0, watcher=watch)
    assert len(watch.seen) == len(rows) + 1 and all("fixed_inputs" in row for row in rows)
    expected = learned.method.state_dict()
    assert [name for name, tensor in method.state_dict().items() if not torch.equal(tensor, expected[name].cpu())] == []


def test_the_restored_artifact_samples_what_the_trainer_samples(learned):
    trainers, restored = (proof.evidence(method, learned.base) for method in (learned.method, learned.restored))
    assert torch.equal(trainers.latents, restored.latents)
    assert proof.compare(trainers, restored, learned.base)["device"] == "cuda"


def test_every_way_of_sampling_stays_on_the_card(learned):
    base, method = learned.base, learned.restored
    prompts, noise = [method.say(template) for template in ("a photo of a {}", "a {} on the beach")], noise_of(base)
    for sampling in every_sampling(learned.case.name):
        method.sampling = sampling
        method.config.check(sampling)
        latents = sample(method, base, prompts, noise, make_sampler("ddim", base), 1, 4.0)
        assert latents.device.type == "cuda" and latents.isfinite().all(), sampling
    method.sampling = method.config.Sampling()
    with_noise = make_sampler("ddim", base, eta=0.5, generators=step_generators(0, PLACES))
    for sampler in (make_sampler("dpm-solver++", base), with_noise):
        pixels = base.decode(sample(method, base, prompts, noise, sampler, 2, 4.0))
        assert pixels.device.type == "cpu" and pixels.dtype == torch.uint8


def noise_of(base: BaseModel) -> Tensor:
    return initial_noise(base, 0, PLACES)


def every_sampling(name: str) -> Iterator[Any]:
    """Each combination of choices, and each option that is a number at another value than its default."""
    kind, choices = recipe_class(name).Sampling, samplings_of(name)
    yield from (kind(**chosen) for chosen in choices)
    others = {field.name for field in dataclasses.fields(kind)} - choices[0].keys()
    for option in sorted(others):
        yield kind(**{option: NUMBERS[option]})


def test_an_embedding_is_refined_for_a_prompt(learned):
    base, method = learned.base, learned.restored
    if learned.method.config.text_embeddings != 1:
        with pytest.raises(InputError, match="text embedding"):
            ContextRefined(method, learned.images, 0)
        return
    refined = ContextRefined(method, learned.images, 0, Refinement(steps=1, batch_size=2))
    prompts = [method.say("a photo of a {}"), "the jungle"]
    assert sample(refined, base, prompts, noise_of(base), make_sampler("ddim", base), 1, 4.0).isfinite().all()
    assert list(refined.refined) == prompts[:1]


def test_the_analyses_read_what_lies_on_the_card(learned):
    base, method, start = learned.base, learned.restored, learned.start.to(learned.base.device)
    sampler, noise = make_sampler("ddim", base), noise_of(base)
    found = heat_maps.heat_maps(method, base, method.say("a photo of a {}"), noise[:1], sampler, 1, 4.0)
    assert heat_maps.metrics(found)["words"]
    base.decode(bare_placeholder.with_base_unet(method, base, noise, sampler, 1, 4.0))
    context_tokens.of_noun(base, "dog", CONCEPT)
    context_tokens.others(base, "dog", ["bear", "mug", "desert", "beach"])
    with suppress(NotDefined):
        context_tokens.of_concept(method, base, 500)
    with suppress(NotDefined):
        before, after = learned_embedding.both_ends(start, method, base)
        words, table = learned_embedding.vocabulary(base)
        assert learned_embedding.nearest_words(after, table, words)
        assert len(before) == len(after) > 0
        assert any(learned.reads)


def test_what_is_exported_can_be_imported(learned, tmp_path):
    base, kind = learned.base, type(learned.method)
    if kind.export is Method.export:
        with pytest.raises(InputError):
            learned.restored.export(base, tmp_path)
        return
    learned.restored.export(base, tmp_path)
    if kind.imported.__func__ is Method.imported.__func__:  # type: ignore[attr-defined]
        return
    imported = kind.imported(learned.restored.config, base, CONCEPT, tmp_path).to(base.device)
    assert imported.requires_grad_(False).eval().state_dict().keys() == learned.restored.state_dict().keys()
    assert proof.sampled_latents(imported, base).isfinite().all()


@only(filter(shares_images, METHOD_NAMES))
def test_several_concepts_share_an_image(learned):
    base, method = learned.base, learned.restored
    other = saving.restore(learned.folder, base)
    other.concept = dataclasses.replace(CONCEPT, name="w", placeholder="<w>")
    together = Together([method, other], base).eval()
    prompts = [together.say("a photo of <v> beside a <w>")]
    assert sample(together, base, prompts, noise_of(base)[:1], make_sampler("ddim", base), 1, 4.0).isfinite().all()
    method.sampling = method.config.Sampling()


@only(name for name in METHOD_NAMES if name in TRAINED)
def test_a_training_that_was_cut_off_resumes_on_the_card(learned, tmp_path):
    """In its last stage, so that what earlier stages left behind is restored too."""
    base, checkpoints = learned.base, Checkpoints(tmp_path, "stamp", **EVERY_STEP)
    rows = []

    def cut_off(row: LogRow) -> None:
        rows.append(row)
        if len(rows) == len(learned.log):
            raise CutOff

    with pytest.raises(CutOff):
        train(learned.case.make(base, CONCEPT), base, learned.images, 0, cut_off, checkpoints)
    resumed = learned.case.make(base, CONCEPT)
    train(resumed, base, learned.images, 0, checkpoints=checkpoints)
    expected = learned.method.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor.cpu(), expected[name].cpu()), name


OTHER_CHOICES = [case for case in LEARNING if case.chosen]


@pytest.mark.parametrize("case", OTHER_CHOICES, ids=str)
def test_every_other_choice_of_a_recipe_trains_on_the_card(case):
    base = base_on_card(case)
    method = case.make(base, CONCEPT, steps=1)
    assert all(torch.tensor(row["diffusion"]).isfinite() for row in train(method, base, images(), 0))


@only(name for name in METHOD_NAMES if name in TRAINED)
def test_with_gradient_checkpointing_it_learns_the_same(learned):
    base = learned.base
    again = learned.case.make(base, CONCEPT)
    with base.recomputing():
        train(again, base, learned.images, 0)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), learned.method.state_dict()[name].cpu(), atol=1e-5, rtol=1e-3)
