"""DINOv2 and DINOv3: tiny networks of their architectures, against the library's own processors and outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from personalize_core.errors import InputError
from personalize_core.metrics import encoders
from personalize_core.metrics.weights import IDENTITY

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Noise of unlike shapes, larger and smaller than the network's input, some with margins of odd widths."""
    rng = np.random.default_rng(0)
    sizes = [(90, 60), (64, 64), (50, 121), (300, 257), (259, 256), (256, 259)]
    return [Image.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    """With the position embeddings of 518 pixels and the processor of the published ones, which feed 224."""
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2, image_size=518, patch_size=14, hidden_dropout_prob=0.5))
    shaken(model).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory) -> Path:
    """With register tokens, rotary positions and the processor of the published ones."""
    from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

    folder = tmp_path_factory.mktemp("dinov3")
    torch.manual_seed(0)
    model = DINOv3ViTModel(DINOv3ViTConfig(**SIZES, image_size=224, patch_size=16, num_register_tokens=4))
    shaken(model).save_pretrained(folder)
    DINOv3ViTImageProcessor().save_pretrained(folder)
    return folder


def shaken(model: Any) -> Any:
    """With no parameter at its first value, where norms, biases and class tokens could hide."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.2)
    return model


def of_length_one(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def test_dinov2_is_the_librarys_processor_and_its_pooled_output(dinov2, images):
    from transformers import Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    processor, model = BitImageProcessorPil.from_pretrained(dinov2), Dinov2Model.from_pretrained(dinov2).eval()
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = model(pixels).pooler_output
    encoder = encoders.load_identity_encoder(dinov2)
    assert isinstance(encoder, encoders.VisionTransformer)
    assert pixels.shape[2:] == (224, 224)
    torch.testing.assert_close(encoder.prepare(images), pixels, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.images(images), of_length_one(theirs), atol=1e-5, rtol=0)
    assert "shorter side to 256, bicubic; centre crop 224" in encoder.preprocessing


def test_dinov3_is_the_librarys_processor_and_its_pooled_output(dinov3, images):
    from transformers import DINOv3ViTImageProcessor, DINOv3ViTModel

    processor = DINOv3ViTImageProcessor.from_pretrained(dinov3)
    model: Any = DINOv3ViTModel.from_pretrained(dinov3).eval()
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = model(pixels).pooler_output
    encoder = encoders.load_identity_encoder(dinov3)
    assert isinstance(encoder, encoders.VisionTransformer)
    torch.testing.assert_close(encoder.prepare(images), pixels, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.images(images), of_length_one(theirs), atol=1e-5, rtol=0)
    assert encoder.preprocessing.startswith("RGB; values in [0, 1]; both sides to 224, bilinear with antialiasing")
    on_eight_bits = replace(encoder.prepare, scaled_first=False)(images)
    assert (on_eight_bits - pixels).abs().max() > 1e-3  # so that the order is seen to matter


def test_terms_that_were_not_accepted_are_named_with_what_to_do(monkeypatch):
    import huggingface_hub
    from httpx import Request, Response
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args, local_files_only, **options):
        if local_files_only:
            raise OSError("not in the cache")
        response: Any = Response(403, request=Request("GET", "https://huggingface.co"))
        raise GatedRepoError("403", response=response)

    class Session:
        def head(self, *args, **options):
            return None

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    with pytest.raises(InputError, match="accept the DINOv3 License at https://huggingface.co/facebook/dinov3-vits16"):
        encoders.load_identity_encoder("dinov3-s16")


@pytest.mark.parametrize(
    ("name", "width"), [("dinov2-s14", 384), ("dinov2-b14", 768), ("dinov3-s16", 384), ("dinov3-b16", 768)]
)
def test_a_folder_of_another_size_is_not_the_published_encoder(dinov2, name, width):
    assert IDENTITY[name].width == width
    with pytest.raises(InputError, match=f"is not {name}: its features have width 32, not {width}"):
        encoders.load_identity_encoder(f"{name}:{dinov2}")


@pytest.mark.parametrize("config", [{"model_type": "resnet"}, {}, []])
def test_a_network_of_another_kind_is_refused_with_the_known_ones(dinov2, tmp_path, config):
    for file in dinov2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="config.json names no model_type that is known here: .*dinov2"):
        encoders.load_identity_encoder(tmp_path)
