"""What is exported draws in stock diffusers what it draws here: loaded by diffusers' own functions, nothing else.

The other way round, test_import.py loads what stock diffusers saves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.methods import method_class
from personalize_core.sampling.sampler import initial_noise, make_sampler, sample
from tests.conftest import disturbed, stock_pipeline, tiny_parts

TOLERANCE = 1e-5  # of one answer of the U-Net, in float32
IMAGE = 2e-4  # of an image after 5 steps with a guidance of 6


@pytest.fixture
def concept() -> Concept:
    return Concept("v", "<v>", "teddy bear")


def trained(name: str, base: BaseModel, concept: Concept, **chosen) -> Any:
    """The method with something learned: its parameters moved at random."""
    kind: Any = method_class(name)
    return disturbed(kind(kind.Config(**chosen), base, concept)).eval()


def fresh_pipeline(base: BaseModel, **changed) -> Any:
    """A pipeline of fresh parts that have never been near this project's code."""
    parts = tiny_parts(base.unet.config.use_linear_projection) | changed
    parts["scheduler"] = DDIMScheduler.from_config(parts["scheduler"].config)
    return stock_pipeline(parts)


def check_same(pipe: Any, prompt: str, method: Any, base: BaseModel) -> None:
    """One answer for the same noise and timestep, and one whole image."""
    said = [method.say("a photo of {} on the beach")]
    noise, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([500])
    with torch.no_grad():
        context, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        theirs = pipe.unet(noise, t, context).sample
        with method.attach(base):
            ours = base.denoise(noise, t, method.condition(base, said)(t))
        untouched = base.denoise(noise, t, base.encode(said, method.concept))
    torch.testing.assert_close(theirs, ours, atol=TOLERANCE, rtol=0)
    assert (ours - untouched).abs().max() > 100 * TOLERANCE  # else the comparison would show nothing

    start, size = initial_noise(base, 0, [(0, 0)]), {"height": 16, "width": 16}
    sampled = pipe(
        prompt, latents=start, num_inference_steps=5, guidance_scale=6.0, output_type="latent", **size
    ).images
    expected = sample(method, base, said, start, make_sampler("ddim", base), 5, 6.0)
    torch.testing.assert_close(sampled, expected, atol=IMAGE, rtol=IMAGE)


def with_lora_and_word(base, folder):
    """A stock pipeline with both files of an export."""
    pipe = fresh_pipeline(base)
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    pipe.load_textual_inversion(folder / "learned_embeds.safetensors")
    return pipe


def test_the_embedding_loads_as_a_textual_inversion(base, concept, tmp_path):
    method = trained("textual_inversion", base, concept)
    how = method.export(base, tmp_path)
    assert 'pipe.load_textual_inversion("learned_embeds.safetensors")' in how and "'<v>'" in how
    pipe = fresh_pipeline(base)
    pipe.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    check_same(pipe, "a photo of <v> on the beach", method, base)


def test_the_residuals_load_as_a_lora(base, concept, tmp_path):
    method = trained("personalized_residuals", base, concept)
    how = method.export(base, tmp_path)
    assert 'pipe.load_lora_weights("pytorch_lora_weights.safetensors")' in how and "'sks teddy bear'" in how
    pipe = fresh_pipeline(base)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    check_same(pipe, "a photo of sks teddy bear on the beach", method, base)


def test_residuals_on_other_projections_load_too_beside_their_embedding(base, concept, tmp_path):
    targets = ("to_k", "to_v", "proj_in")
    method = trained("personalized_residuals", base, concept, targets=targets, train_embedding=True)
    how = method.export(base, tmp_path)
    assert "pipe.load_lora_weights(" in how and "pipe.load_textual_inversion(" in how and "'<v> teddy bear'" in how
    pipe = with_lora_and_word(base, tmp_path)
    check_same(pipe, "a photo of <v> teddy bear on the beach", method, base)


def test_a_preference_loads_as_a_lora_beside_its_word(base, concept, tmp_path):
    method = trained("dco", base, concept, rank=4)  # moved at random, a larger change would magnify what is rounded
    how = method.export(base, tmp_path)
    assert 'pipe.load_lora_weights("pytorch_lora_weights.safetensors")' in how and "'<v>' in prompts" in how
    pipe = with_lora_and_word(base, tmp_path)
    check_same(pipe, "a photo of <v> on the beach", method, base)


def test_class_diffusion_loads_as_attention_processors_beside_its_word(base, concept, tmp_path):
    method = trained("class_diffusion", base, concept)
    how = method.export(base, tmp_path)
    assert "pipe.unet.load_attn_procs(" in how and "'<v> teddy bear'" in how
    pipe = fresh_pipeline(base)
    pipe.unet.load_attn_procs(
        tmp_path, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe, use_safetensors=True
    )
    pipe.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    check_same(pipe, "a photo of <v> teddy bear on the beach", method, base)


def test_the_residuals_can_be_merged_there(base, concept, tmp_path):
    method = trained("personalized_residuals", base, concept)
    method.export(base, tmp_path)
    pipe = fresh_pipeline(base)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipe.fuse_lora()
    check_same(pipe, "a photo of sks teddy bear on the beach", method, base)


def test_the_tuned_unet_loads_as_a_unet(base, concept, tmp_path):
    method = trained("dreambooth", base, concept)
    how = method.export(base, tmp_path)
    assert 'UNet2DConditionModel.from_pretrained("unet")' in how and "text_encoder" not in how
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    check_same(fresh_pipeline(base, unet=unet.eval()), "a photo of sks teddy bear on the beach", method, base)


def test_the_tuned_text_encoder_loads_as_a_text_encoder(base, concept, tmp_path):
    method = trained("dreambooth", base, concept, train_text_encoder=True)
    how = method.export(base, tmp_path)
    assert 'CLIPTextModel.from_pretrained("text_encoder")' in how
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    encoder: Any = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    pipe = fresh_pipeline(base, unet=unet.eval(), text_encoder=encoder.eval())
    check_same(pipe, "a photo of sks teddy bear on the beach", method, base)


def test_what_was_tuned_beside_bfloat16_is_exported_in_float32(concept, tmp_path):
    base = BaseModel(name="t", revision="", weights_hash="", **tiny_parts(), dtype=torch.bfloat16)
    method = trained("dreambooth", base, concept)
    method.export(base, tmp_path)
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    exported = unet.state_dict()
    assert all(torch.equal(weight, exported[name]) for name, weight in method.unet.items())
