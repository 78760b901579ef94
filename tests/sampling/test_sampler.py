"""The samplers are diffusers' own, guidance is what it says, and noise belongs to an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from personalize_core.base_model.text import TextContext
from personalize_core.randomness import generator_for
from personalize_core.sampling.sampler import (
    batches,
    denoised,
    guided,
    initial_noise,
    make_sampler,
    ready,
    sample,
    step_generators,
)
from tests.conftest import predict, sample_latents, stock_pipeline, tiny_base, tiny_parts, unpersonalized

PROMPTS = ["a photo of the dog on the beach", "a red mug"]
TIME = torch.tensor([500])
TOLERANCE = 2e-4  # float32 rounding of some 20 calls of the U-Net; guidance multiplies it by 6


def stock_latents(linear: bool, prediction_type: str, sampler: str, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """What diffusers' own pipeline draws, with everything left as diffusers does it."""
    parts = tiny_parts(linear, prediction_type)
    kinds: dict[str, Any] = {"ddim": DDIMScheduler, "dpm-solver++": DPMSolverMultistepScheduler}
    parts["scheduler"] = kinds[sampler].from_config(parts["scheduler"].config)
    pipe = stock_pipeline(parts)
    size = {"height": 16, "width": 16}
    return pipe(
        PROMPTS, latents=noise, num_inference_steps=steps, guidance_scale=6.0, output_type="latent", **size
    ).images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
@pytest.mark.parametrize("linear", [False, True], ids=["convolutional", "linear"])
def test_it_samples_what_the_stock_pipeline_samples(linear, sampler, prediction_type, concept):
    base = tiny_base(linear, prediction_type)
    noise = initial_noise(base, 0, [(0, 0), (1, 0)])
    expected = stock_latents(linear, prediction_type, sampler, noise, steps=4)
    sampled = sample(unpersonalized(base, concept), base, PROMPTS, noise, make_sampler(sampler, base), 4, 6.0)
    torch.testing.assert_close(sampled, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_schedule_is_the_one_that_the_model_brings(tmp_path, concept):
    """Stable Diffusion 1.4's own file, written for PNDM, starts at step 1 and ends at the first alpha."""
    (tmp_path / "scheduler_config.json").write_text(
        '{"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,'
        '"num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,'
        '"clip_sample": false, "trained_betas": null}'
    )
    base: Any = tiny_base()
    base.scheduler = DDPMScheduler.from_pretrained(tmp_path)
    seen = []

    def denoise(x, t):
        seen.append(int(t[0]))
        return base.denoise(x, t, base.encode(["a dog"]))

    noise = initial_noise(base, 0, [(0, 0)])
    sampled = make_sampler("ddim", base)(denoise, noise, 5)
    assert seen == list(range(801, 0, -200))

    scheduler: Any = DDIMScheduler.from_pretrained(tmp_path)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(5)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(base.denoise(x, t.expand(1), base.encode(["a dog"])), t, x).prev_sample
    torch.testing.assert_close(sampled, x, atol=1e-5, rtol=1e-5)


def test_an_unknown_sampler_is_refused_with_the_known_ones(base):
    with pytest.raises(ValueError, match="'euler'; the samplers are ddim, dpm-solver\\+\\+"):
        make_sampler("euler", base)


def test_progress_is_told_step_by_step(base):
    told = []
    sampler = make_sampler("ddim", base, lambda done, steps: told.append((done, steps)))
    sampler(lambda x, t: torch.zeros_like(x), initial_noise(base, 0, [(0, 0)]), 3)
    assert told == [(1, 3), (2, 3), (3, 3)]


# -- noise in every step -----------------------------------------------------------------------------------------


def noisy(base, concept, places, eta=0.7, seed=0):
    """Both prompts, or one, by DDIM that adds noise in its steps."""
    sampler = make_sampler("ddim", base, eta=eta, generators=step_generators(seed, places))
    noise = initial_noise(base, 0, places)
    return sample(unpersonalized(base, concept), base, [PROMPTS[p] for p, _ in places], noise, sampler, 6, 3.0)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_with_eta_it_is_ddim_of_diffusers_with_the_same_noise(base, concept, eta):
    places = [(0, 0), (1, 2)]
    generators = [generator_for(0, "step", prompt, image) for prompt, image in places]
    scheduler: Any = DDIMScheduler.from_config(base.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(6)
    x = initial_noise(base, 0, places)
    denoise = guided(base, lambda t: base.encode(PROMPTS), lambda t: base.encode(["", ""]), 3.0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            sampled = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
            x = scheduler.step(denoise(x, t.expand(2)), t, x, eta=eta, variance_noise=sampled).prev_sample
    assert torch.equal(noisy(base, concept, places, eta), x)
    assert not torch.equal(noisy(base, concept, places, 0.0), x)


def test_the_noise_of_the_steps_belongs_to_its_image_and_not_to_its_batch(base, concept):
    together, alone = noisy(base, concept, [(0, 0), (1, 0)]), noisy(base, concept, [(1, 0)])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)  # convolutions sum in another order
    sampled = [
        step_generators(seed, [place])[0].initial_seed() for seed, place in ((0, (0, 0)), (1, (0, 0)), (0, (0, 1)))
    ]
    assert len({*sampled, generator_for(0, "sample", 0, 0).initial_seed()}) == 4  # not the initial noise over again


def test_every_row_needs_its_own_noise_and_only_ddim_adds_any(base):
    with pytest.raises(ValueError, match="shorter"):
        make_sampler("ddim", base, eta=1.0)(lambda x, t: torch.zeros_like(x), initial_noise(base, 0, [(0, 0)]), 2)
    with pytest.raises(ValueError, match="eta = 1.0 is an option of ddim"):
        make_sampler("dpm-solver++", base, eta=1.0)


# -- guidance --------------------------------------------------------------------------------------------------


def answers(base, concept, scale):
    prompt, empty = base.encode(PROMPTS, concept), base.encode(["", ""], concept)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).expand(2, -1, -1, -1)
    with torch.no_grad():
        sampled = guided(base, lambda t: prompt, lambda t: empty, scale)(x, torch.full((2,), 500))
    return sampled, predict(base, prompt), predict(base, empty)


def test_guidance_of_one_is_the_prompt_alone(base, concept):
    sampled, prompt, _ = answers(base, concept, 1.0)
    torch.testing.assert_close(sampled, prompt, atol=1e-5, rtol=0)


def test_guidance_of_nought_is_no_prompt(base, concept):
    sampled, _, empty = answers(base, concept, 0.0)
    torch.testing.assert_close(sampled, empty, atol=1e-5, rtol=0)


def test_more_guidance_goes_on_in_the_same_direction(base, concept):
    sampled, prompt, empty = answers(base, concept, 6.0)
    torch.testing.assert_close(sampled, empty + 6 * (prompt - empty), atol=1e-4, rtol=0)


def test_a_conditioning_is_asked_at_every_timestep(base, concept):
    asked = []
    context = base.encode(["a dog"], concept)

    def prompt(t):
        asked.append(t.tolist())
        return context

    denoise = guided(base, prompt, lambda t: context, 2.0)
    make_sampler("ddim", base)(denoise, initial_noise(base, 0, [(0, 0)]), 4)
    assert asked == [[751], [501], [251], [1]]


def test_what_a_layer_reads_is_made_anew_only_where_a_conditioning_gives_another_text(base, concept, monkeypatch):
    """Against guidance whose halves are put together in every step."""
    texts = {t: base.encode([f"a photo of {t // 300} red"], concept) for t in (751, 501, 251, 1)}
    same, empty = base.encode(["a red mug"], concept), base.encode([""], concept)
    noise, made = initial_noise(base, 0, [(0, 0)]), []
    guidance = TextContext.guidance
    monkeypatch.setattr(TextContext, "guidance", lambda *halves: made.append(halves) or guidance(*halves))
    for prompt, count in ((lambda t: same, 1), (lambda t: texts[int(t[0])], 4)):
        made.clear()

        def naive(x, t, prompt=prompt):
            without, said = base.denoise(x, t, empty), base.denoise(x, t, prompt(t))
            return without + 3.0 * (said - without)

        sampled = make_sampler("ddim", base)(guided(base, prompt, lambda t: empty, 3.0), noise, 4)
        assert len(made) == count
        torch.testing.assert_close(sampled, make_sampler("ddim", base)(naive, noise, 4), atol=1e-4, rtol=1e-4)


def test_attention_maps_are_kept_for_those_who_look_alone(base, concept, monkeypatch):
    context, kept = base.encode(["a dog"], concept), []
    denoise = base.denoise
    monkeypatch.setattr(
        base, "denoise", lambda x, t, both, maps: (denoise(x, t, both, maps), kept.append(len(maps)))[0]
    )
    seen: list[int] = []
    for look in (None, lambda maps: seen.append(len(maps))):
        guided(base, lambda t: context, lambda t: context, 3.0, look)(initial_noise(base, 0, [(0, 0)]), TIME)
    assert kept == [1, len(base.layers)] and seen == [len(base.layers)]  # hooks look at the layer that has just run


# -- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "images", "sizes"),
    [
        (8, 16, [16]),
        (8, 17, [8, 9]),
        (64, 40, [13, 13, 14]),
        (96, 16, [5, 5, 6]),
        (512, 2, [1, 1]),
        (8, 0, []),
    ],
)
def test_images_are_sampled_in_few_batches_of_nearly_one_size(base, side, images, sizes):
    """Latents of 96 x 96 are those of 768 pixels, of which 7 are as much as 16 of 512 pixels."""
    base.unet.register_to_config(sample_size=side)
    parts = batches(base, images)
    assert [len(range(images)[part]) for part in parts] == sizes
    assert [image for part in parts for image in range(images)[part]] == list(range(images))


def test_a_method_that_is_ready_samples_one_batch_after_the_other(base, concept):
    method, sampler = unpersonalized(base, concept).train(), make_sampler("ddim", base)
    noise = initial_noise(base, 0, [(0, 0), (1, 0)])
    with ready(method, base):
        parts = [denoised(method, base, PROMPTS[i : i + 1], noise[i : i + 1], sampler, 3, 4.0) for i in (0, 1)]
    alone = [sample(method, base, PROMPTS[i : i + 1], noise[i : i + 1], sampler, 3, 4.0) for i in (0, 1)]
    assert torch.equal(torch.cat(parts), torch.cat(alone))


# -- noise -----------------------------------------------------------------------------------------------------


def test_noise_belongs_to_its_image_and_not_to_its_batch(base):
    together = initial_noise(base, 0, [(0, 0), (0, 1), (1, 0)])
    assert torch.equal(together[1:2], initial_noise(base, 0, [(0, 1)]))
    assert torch.equal(together[[2, 0]], initial_noise(base, 0, [(1, 0), (0, 0)]))


def test_prompt_image_and_seed_each_give_other_noise(base):
    sampled = [
        initial_noise(base, seed, [place]) for seed, place in ((0, (0, 0)), (1, (0, 0)), (0, (1, 0)), (0, (0, 1)))
    ]
    assert len({tuple(noise.flatten().tolist()) for noise in sampled}) == 4


def test_noise_is_standard_normal(base):
    noise = initial_noise(base, 0, [(prompt, image) for prompt in range(20) for image in range(20)])
    assert noise.shape == (400, 4, 8, 8)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02  # five standard errors of 102,400 draws


def test_a_image_does_not_depend_on_what_was_sampled_before(base, concept):
    method = unpersonalized(base, concept)
    torch.manual_seed(1)
    first = sample_latents(method, base, PROMPTS)
    torch.manual_seed(2)
    sample_latents(method, base, PROMPTS[:1])
    assert torch.equal(sample_latents(method, base, PROMPTS), first)


def test_one_sampler_serves_several_batches(base, concept):
    method, sampler = unpersonalized(base, concept), make_sampler("dpm-solver++", base)
    noise = initial_noise(base, 0, [(0, 0)])
    sampled = [sample(method, base, PROMPTS[:1], noise, sampler, 4, 6.0) for _ in range(2)]
    assert torch.equal(sampled[0], sampled[1])


def test_sampling_switches_training_off_and_asks_for_no_gradient(base, concept):
    method = unpersonalized(base, concept).train()
    assert not sample_latents(method, base, PROMPTS).requires_grad
    assert not method.training
