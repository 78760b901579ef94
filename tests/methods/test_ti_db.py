"""TI+DB trains the placeholder's embedding and the whole U-Net together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents, Preprocessing
from personalize_core.methods.ti_db.method import TIDB, Config
from personalize_core.training.loop import denoising_step, diffusion_loss, train
from tests.artifacts.test_export import check_same, fresh_pipeline
from tests.conftest import disturbed, predict, sample_latents

PROMPT = "a photo of a <v> dog"


@pytest.fixture
def make(base, concept) -> Any:
    return lambda **chosen: TIDB(Config(steps=3, **chosen), base, concept)


def test_the_prompt_is_attndreambooths(make, images):
    batch = make().batch(images, 2, torch.Generator())
    assert batch.prompts == [PROMPT] * 2


def test_the_loss_is_the_plain_mean_without_class_images(make, base, images):
    (stage,) = make(batch_size=3).stages()
    step = denoising_step(make(), base, images, stage, seed=0, index=0)
    error = step.prediction.detach().double().numpy() - step.target.double().numpy()
    assert len(error) == 3
    np.testing.assert_allclose(diffusion_loss(step).item(), np.mean(error**2), rtol=1e-5)
    assert Config().class_images_needed == 0


@pytest.mark.parametrize(("rule", "word"), [("last", "bear"), ("first", "teddy")])
def test_the_embedding_starts_from_one_token_of_the_class_noun(rule, word, base):
    method = TIDB(Config(class_token_rule=rule), base, Concept("b", "<b>", "teddy bear"))
    assert torch.equal(method.embedding.vector, base.word_embedding(word))


def test_or_from_the_mean_of_its_tokens(base):
    method = TIDB(Config(class_token_rule="mean"), base, Concept("b", "<b>", "teddy bear"))
    both = [base.word_embedding(word).double().numpy() for word in ("teddy", "bear")]
    np.testing.assert_allclose(method.embedding.vector.detach().numpy(), (both[0] + both[1]) / 2, rtol=1e-6)


def test_untrained_it_reads_as_the_class_noun_twice(make, base, concept):
    with torch.no_grad():
        said = make().condition(base, ["a photo of a <v> dog"])(torch.tensor([0])).hidden
        assert torch.equal(said, base.encode(["a photo of a dog dog"], concept).hidden)


def test_embedding_and_unet_are_trained_by_one_optimizer_at_one_rate(make, base):
    (stage,) = make(lr=1e-4).stages()
    assert {group["lr"] for group in stage.param_groups} == {1e-4}
    trained = sum(parameter.numel() for group in stage.param_groups for parameter in group["params"])
    assert trained == base.text_width + sum(parameter.numel() for parameter in base.unet.parameters())


def test_the_embedding_can_have_a_rate_of_its_own(make, base):
    (stage,) = make(lr=1e-4, lr_embedding=1e-2).stages()
    rates = {
        parameter.numel() == base.text_width: group["lr"]
        for group in stage.param_groups
        for parameter in group["params"][:1]
    }
    assert rates == {True: 1e-2, False: 1e-4}


def test_in_one_step_both_get_gradient(make, base, images):
    method = make().train()
    (stage,) = method.stages()
    with method.attach(base):
        loss = diffusion_loss(denoising_step(method, base, images, stage, seed=0, index=0))
    embedding, *unet = torch.autograd.grad(loss, [method.embedding.vector, *method.unet.parameters()])
    assert embedding.isfinite().all() and embedding.abs().sum() > 0
    assert sum(bool(gradient.abs().sum() > 0) for gradient in unet) > 0.9 * len(unet)


def test_a_step_moves_no_number_further_than_the_rate(make, base, images):
    """AdamW's first step is the rate, in every number: why the embedding hardly moves (docs/methods.md#tidb)."""
    method = TIDB(Config(steps=1, batch_size=2), base, make().concept)
    start = method.embedding.vector.detach().clone()
    train(method, base, images, seed=0)
    moved = (method.embedding.vector - start).abs()
    assert 0 < moved.max() < 3e-6
    assert torch.cosine_similarity(method.embedding.vector, start, dim=0) > 0.9997


def test_the_unet_acts_on_every_prompt_and_the_embedding_on_the_concepts(make, base, concept):
    method, prompts = make(), ["the desert", PROMPT]
    expected = sample_latents(method, base, prompts)
    embedding_moved = sample_latents(disturbed(method, starting="embedding"), base, prompts)
    assert torch.equal(embedding_moved[0], expected[0]) and not torch.equal(embedding_moved[1], expected[1])
    context = base.encode(["the desert"], concept)
    untouched = predict(base, context)
    with disturbed(method, starting="unet").attach(base):
        assert not torch.equal(predict(base, context), untouched)


def test_it_trains_on_a_single_concept_image(make, base, images):
    method = make(batch_size=2)
    log = train(method, base, ConceptLatents(images.concept[:1]), seed=0)
    assert len(log) == 3 and all(np.isfinite(row["diffusion"]) for row in log)


def test_concept_images_are_prepared_as_for_attndreambooth_or_without_rotation():
    """The preparation of the images: the rotation is in the code only; also run without."""
    assert Config().preprocessing == Preprocessing("rotate", "bilinear", flip=True)
    assert Config(rotate=False).preprocessing == Preprocessing("crop", "bilinear", flip=False)


def test_embedding_and_unet_load_in_diffusers_and_predict_the_same(base, tmp_path: Path):
    method = disturbed(TIDB(Config(), base, Concept("v", "<v>", "teddy bear"))).eval()
    how = method.export(base, tmp_path)
    assert 'UNet2DConditionModel.from_pretrained("unet")' in how and "load_textual_inversion" in how
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    pipe = fresh_pipeline(base, unet=unet.eval())
    pipe.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    check_same(pipe, "a photo of <v> teddy bear on the beach", method, base)


def test_the_recipe_is_the_papers():
    """docs/methods.md#tidb: 660 steps, as AttnDreamBooth's three stages together; batch 8; 2e-6."""
    c = Config()
    assert (c.steps, c.batch_size, c.lr, c.lr_embedding) == (60 + 100 + 500, 8, 2e-6, None)
