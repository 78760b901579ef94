"""What ships: a Stable Diffusion that opens offline and draws, two encoders that open, in 30 MB."""

from pathlib import Path
from typing import Any

import pytest
import torch

from personalize_core.mini.export import LIMIT, WEIGHTS, size_of
from personalize_core.workspace.recipes import device_of
from personalize_core.workspace.store import Store

pytestmark = pytest.mark.skipif(not (WEIGHTS / "base" / "model_index.json").exists(), reason="no weights exported yet")


@pytest.fixture(scope="module")
def model():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        WEIGHTS / "base", torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_pipeline_draws(model):
    torch.set_num_threads(1)
    image = model("a photo of a red mug", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)


def test_it_draws_at_its_own_size_unasked(model):
    assert model.unet.config.sample_size * model.vae_scale_factor == 64


def test_it_has_sd_1s_sixteen_cross_attention_layers(model):
    names = [name for name, _ in model.unet.named_modules() if name.endswith("attn2")]
    assert len(names) == 16
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2" in names
    assert "mid_block.attentions.0.transformer_blocks.0.attn2" in names


def test_all_weights_are_small_finite_safetensors(model):
    assert size_of(WEIGHTS) <= LIMIT
    assert not [p for p in WEIGHTS.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    for part in (model.unet, model.text_encoder, model.vae):
        assert all(torch.isfinite(p).all() for p in part.parameters())


def test_clip_reads_and_sees():
    import open_clip

    clip: Any = open_clip.create_model(f"local-dir:{WEIGHTS / 'clip'}")
    ids = open_clip.get_tokenizer(f"local-dir:{WEIGHTS / 'clip'}")(["a photo of a dog", "a photo of a cat"])
    with torch.no_grad():
        assert clip.encode_image(torch.zeros(1, 3, 64, 64)).shape[1] == clip.encode_text(ids).shape[1]


def test_the_identity_encoder_opens():
    from transformers import ViTModel

    vit = ViTModel.from_pretrained(WEIGHTS / "identity", add_pooling_layer=False, local_files_only=True)
    with torch.no_grad():
        assert vit(torch.zeros(1, 3, 64, 64)).last_hidden_state.shape == (1, 65, 128)


def test_beside_the_miniature_a_step_computes_on_one_thread_whatever_the_machine_has():
    torch.set_num_threads(2)
    assert device_of(Store(Path(__file__).parents[2])) in ("cpu", "cuda")  # params.yaml's base model is the miniature
    assert torch.get_num_threads() == 1
