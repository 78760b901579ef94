"""An artifact to images: a grid of every prompt of the list, by every sampling variant of the method."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.files.atomic import is_up_to_date, read_record, write_json
from personalize_core.sampling.grid import DESCRIPTION, image_name
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.steps.latents import encode_concept, read_latents
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.recipes import load_base, preprocessing_of, prompts_of, variants_of
from personalize_core.workspace.stamps.sampling import refined_by, sampling_inputs
from personalize_core.workspace.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from personalize_core.base_model.model import BaseModel
    from personalize_core.methods.interface import Method
    from personalize_core.workspace.sampling_settings import SamplerSettings
    from personalize_core.workspace.variants import Variant


def sample_grid(store: Store, concept: str, method: str, listener: Listener = unheard) -> Report:
    """Images of the concept in every prompt of the list, by each sampling variant of the method.

    Raises:
        InputError: the method has not been trained on the concept, or not on this base model.
    """
    store.params.check_method(method)
    started = time.monotonic()
    folder, how = store.grid(method, concept), store.params.sampling
    refining(store, concept, method, variants_of(store, method), listener)
    images = {"grid": folder / "grid.png"}
    with store.alone("grid", method, concept), ExitStack() as while_sampling:
        with store.alone("artifact", method, concept):  # whoever trains it anew: what is named is what samples
            inputs = sampling_inputs(store, concept, method)
            if is_up_to_date(folder, inputs.stamp):
                return Report(inputs.stamp, True, time.monotonic() - started, folder, {}, images)
            from personalize_core.artifacts.saving import restore
            from personalize_core.report import comparison
            from personalize_core.training.run_costs import PeakMemory

            new = while_sampling.enter_context(making(store, folder, inputs.stamp))
            while_sampling.enter_context(store.device())
            base = load_base(store)
            trained = restore(store.artifact(method, concept), base, method)
        templates = inputs.prompts.templates
        places = [(p, i) for p in range(len(templates)) for i in range(how.images_per_prompt)]
        memory, each = PeakMemory(base.device), {}
        for name, variant in inputs.variants.items():
            begun = time.monotonic()
            paths = [new / image_name(name, prompt, image) for prompt, image in places]
            prompts = [trained.say(templates[prompt]) for prompt, _ in places]
            sampled = ready_to_sample(variant, store, concept, method, base, trained, prompts, listener)
            what = f"sampling {concept} by {name}"
            sample_images(how, store.sampling_seed, base, sampled, prompts, places, paths, what, listener)
            each[name] = (time.monotonic() - begun) / len(places)
        taken = {"stamp": inputs.stamp, "seconds_per_image": each, **memory.costs()}
        about = {
            "concept": concept,
            "class_noun": trained.concept.class_noun,
            "method": method,
            "base_model": base.name,
            "templates": templates,
            "images_per_prompt": how.images_per_prompt,
            "variants": list(inputs.variants),
            "protocol": store.protocol,
            "prompts": inputs.prompts.name,
            "sampling": how.how(),
            "seed": store.sampling_seed,
            "artifact": inputs.artifact,
        }
        write_json(new / DESCRIPTION, about)
        comparison.save_grid(store, concept, [(name, new) for name in inputs.variants], about, new / "grid.png")
        # before the grid appears: a run killed just after that would never write them
        write_json(store.sampling_costs(method, concept), taken)
    return Report(inputs.stamp, False, time.monotonic() - started, folder, {}, images)


def sample_images(
    how: SamplerSettings,
    seed: int,
    base: BaseModel,
    method: Method,
    prompts: Sequence[str],
    places: Sequence[tuple[int, int]],
    paths: Iterable[Path],
    what: str,
    listener: Listener,
    together: Sequence[slice] | None = None,
) -> None:
    """Sample one image per prompt, a few at a time; places are (prompt index, image index), which choose the noise.

    The images of a batch are written while the next is sampled.

    Args:
        together: which images make a batch; as `sampler.batches` has it, if None.
    """
    from personalize_core.files.background import Background
    from personalize_core.sampling.sampler import (
        batches,
        denoised,
        initial_noise,
        make_sampler,
        ready,
        step_generators,
    )

    paths = list(paths)
    with base.compiled(), ready(method, base), Background() as writer:
        for rows in batches(base, len(prompts)) if together is None else together:
            said, noise = prompts[rows], initial_noise(base, seed, places[rows])

            def progress(done: int, steps: int, start: int = rows.start, size: int = len(said)) -> None:
                listener(Event(what, start * steps + done * size, len(prompts) * steps))

            sampler = make_sampler(how.sampler, base, progress, how.eta, step_generators(seed, places[rows]))
            pixels = base.decode(denoised(method, base, said, noise, sampler, how.steps, how.guidance))
            writer.do(partial(_write_images, pixels, paths[rows]))


def _write_images(pixels: Tensor, paths: Sequence[Path]) -> None:
    """pixels: (B, H, W, 3) uint8."""
    from PIL import Image

    for path, image in zip(paths, pixels.numpy(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def ready_to_sample(
    variant: Variant,
    store: Store,
    concept: str,
    method: str,
    base: BaseModel,
    trained: Method,
    prompts: Sequence[str],
    listener: Listener,
) -> Method:
    """What was learned, ready to sample these prompts in one variant; the artifact stays as it is."""
    from personalize_core.sampling.test_time_optimization import ContextRefined
    from personalize_core.sampling.weight_guidance import WeightGuided, check_by_weights

    trained.sampling = variant.sampling
    sampled = trained
    if variant.refinement:
        latents = read_latents(store, concept, method, None)
        sampled = refined = ContextRefined(trained, latents, store.sampling_seed, variant.refinement)
        what = f"refining {concept} for the prompts of {variant.name}"
        refined.refine(base, prompts, lambda done, steps, loss: listener(Event(what, done, steps, {"loss": loss})))
    if variant.guidance:
        check_by_weights(trained, variant.guidance)  # an imported artifact may have another recipe than params.yaml
        sampled = WeightGuided(sampled, variant.guidance)
    return sampled


def refining(
    store: Store, concept: str, method: str, variants: Mapping[str, Variant], listener: Listener
) -> dict[str, Any]:
    """What images depend on besides, where a variant asks for a strategy beside the method's own options.

    Test-time optimization looks at the concept's images, which may be others by now than those that the artifact was
    trained on.
    """
    if any(variant.refinement for variant in variants.values()):
        encode_concept(store, concept, preprocessing_of(store, method), listener)
    return refined_by(store, concept, method, variants)


def sampled_as_now(store: Store, method: str, concept: str) -> bool:
    """Were these images sampled in the prompts, by the sampler and from the noise that they would be sampled from now?

    Scores without a grid, which only DVC's cache could bring, are taken for what they are.
    """
    grid = read_record(store.grid(method, concept) / DESCRIPTION)
    if not grid:
        return True
    now = {"seed": store.sampling_seed, "templates": prompts_of(store, concept).templates}
    before = {name: grid.get(name) for name in now}
    how, sampled = store.params.sampling.how(), grid.get("sampling")
    if not isinstance(sampled, dict):
        return False
    return before == now and {name: sampled.get(name, 0.0) for name in how} == how  # earlier grids say no eta
