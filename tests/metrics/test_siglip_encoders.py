"""SigLIP 2 at a fixed size: a tiny network of its architecture, against the library's own processor and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from personalize_core.errors import InputError
from personalize_core.metrics import encoders

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz", *"ADP"]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(90, 60), (64, 64), (50, 121), (300, 257)]
    return [Image.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Path:
    """A folder with the files that google/siglip2-base-patch16-224 has; its tokenizer keeps capital letters."""
    from transformers import GemmaTokenizer, SiglipConfig, SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    folder = tmp_path_factory.mktemp("siglip")
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = tower | {"vocab_size": len(WORDS), "max_position_embeddings": 24, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config=tower | {"image_size": 64, "patch_size": 16})
    torch.manual_seed(0)
    model: Any = SiglipModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    GemmaTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, merges=[]).save_pretrained(folder)
    SiglipImageProcessorPil(
        size={"height": 64, "width": 64}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    return folder


def of_length_one(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def test_images_are_the_librarys_processor_and_its_pooled_output(siglip, images):
    from transformers import SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    model: Any = SiglipModel.from_pretrained(siglip).eval()
    pixels = SiglipImageProcessorPil.from_pretrained(siglip)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=pixels).pooler_output
    encoder = encoders.load_text_image_encoder(siglip)
    assert isinstance(encoder, encoders.SigLip)
    torch.testing.assert_close(encoder.prepare(images), pixels, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.images(images), of_length_one(theirs), atol=1e-5, rtol=0)
    assert "both sides to 64, bilinear" in encoder.preprocessing
    assert "texts in lower case, padded to 24 tokens" in encoder.preprocessing


def test_texts_are_lower_case_padded_and_cut_off_at_the_models_length(siglip):
    from transformers import AutoTokenizer, SiglipModel

    model: Any = SiglipModel.from_pretrained(siglip).eval()
    tokenizer = AutoTokenizer.from_pretrained(siglip)
    lower = ["a photo of a dog", "a cat", "dog " * 40]
    tokens = tokenizer(lower, padding="max_length", max_length=24, truncation=True, return_tensors="pt")["input_ids"]
    assert tokens.shape == (3, 24)
    assert len(set(tokens[1].tolist())) > 3 and int(tokens[1].eq(tokenizer.pad_token_id).sum()) > 10
    with torch.no_grad():
        theirs = model.get_text_features(input_ids=tokens).pooler_output
    encoder = encoders.load_text_image_encoder(siglip)
    ours = encoder.texts(["A Photo of a Dog", "a cat", "dog " * 60])
    torch.testing.assert_close(ours, of_length_one(theirs), atol=1e-5, rtol=0)
    alone = encoder.texts(["a cat"])
    torch.testing.assert_close(alone[0], ours[1], atol=1e-6, rtol=0)


def test_a_folder_of_another_size_is_not_the_published_encoder(siglip):
    with pytest.raises(InputError, match="is not siglip2-b16: its features have width 32, not 768"):
        encoders.load_text_image_encoder(f"siglip2-b16:{siglip}")


def test_a_folder_of_transformers_with_another_network_is_refused(siglip, tmp_path):
    for file in siglip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match="config.json names no model_type that is known here: siglip"):
        encoders.load_text_image_encoder(tmp_path)
