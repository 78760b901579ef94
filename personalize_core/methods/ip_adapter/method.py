"""IP-Adapter: a pretrained adapter with which the cross-attention reads images beside the words.

Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models", arXiv:2308.06721.
The weights are read by diffusers' own loader; docs/methods.md#ip-adapter says what is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from personalize_core.base_model.model import BaseModel, hooked
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods.interface import Method, Stage
from personalize_core.methods.ip_adapter.recipe import ADAPTERS, ENCODER, Config, Published, folder_of
from personalize_core.methods.shared.layer_modules import LayerModules

TOKENS = 4  # that an image becomes (sec. 3.2)
WITHOUT, WITH = 0, 1  # rows of `ImageText`: the prompt-free half of guidance, and the other


class ImageText(nn.Module):
    """The keys and values that one cross-attention layer takes from the concept images; zeros until they are seen."""

    keys: Tensor  # (2, TOKENS, C): WITHOUT and WITH
    values: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, TOKENS, width))
        self.register_buffer("values", torch.zeros(2, TOKENS, width))


class IPAdapter(Method):
    """Decoupled cross-attention to the concept images (eq. 5); the prompt says the class noun.

    The images are the same in every step of every image, so what the adapter makes of them is computed once, before
    anything is sampled, and is all that an artifact holds: keys and values of each layer. Neither the adapter nor its
    image encoder is needed for sampling, and no attention processor of the base model is replaced.
    """

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.images = LayerModules(
            {path: ImageText(layer.to_k.out_features) for path, layer in _cross_attentions(base).items()}
        )

    @property
    def phrase(self) -> str:
        return self.concept.class_noun

    def stages(self) -> list[Stage]:
        return []

    # Before anything is sampled

    def check_sight(self, base: BaseModel) -> None:
        """See `interface.SeesImages`."""
        Adapter.found(self.config.adapter, base)

    @torch.no_grad()
    def see(self, images: Sequence[Image.Image], base: BaseModel) -> None:
        """See `interface.SeesImages`. Of several images the embeddings are averaged."""
        adapter = Adapter.found(self.config.adapter, base)
        seen = adapter.embeddings(images, base.device).mean(dim=0)
        projection, layers = adapter.networks(base)
        tokens = projection.to(base.device)(torch.stack([torch.zeros_like(seen), seen]))  # (2, TOKENS, D)
        for path, processor in layers.items():
            own, processor = self.images.of(path), processor.to(base.device)
            own.keys, own.values = processor.to_k_ip[0](tokens), processor.to_v_ip[0](tokens)

    # Sampling

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        handles = []
        for path, layer in _cross_attentions(base).items():
            keep, add = self._adding(base, layer, self.images.of(path))
            handles += [layer.to_q.register_forward_hook(keep), layer.to_out[0].register_forward_pre_hook(add)]
        return hooked(*handles)

    def _adding(self, base: BaseModel, layer: Any, images: ImageText) -> tuple[Callable, Callable]:
        """softmax(Q K^T / sqrt(d)) V + scale softmax(Q K'^T / sqrt(d)) V' (eq. 5), before the output projection."""
        queries: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, query: Tensor) -> None:
            queries[:] = [query]

        def add(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (of_text,), query = args, queries.pop()  # (B, h*w, C) each
            rows = torch.where(base.call.context.unconditional, WITHOUT, WITH)
            key, value = images.keys.to(query)[rows], images.values.to(query)[rows]
            q, k, v = (_heads(x, layer.heads) for x in (query, key, value))
            of_images = F.scaled_dot_product_attention(q, k, v)
            return (of_text + self.sampling.scale * of_images.transpose(1, 2).flatten(2),)

        return keep, add


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, which fit the base model as far as can be seen without reading all of them."""

    name: str
    weights: Path
    encoder: Path

    @classmethod
    def found(cls, name: str, base: BaseModel) -> Adapter:
        """The adapter of this name, or in this folder; fetched from the hub at its pinned commit.

        Raises:
            InputError: it is of another base model, cannot be had, or is none of the plain kind.
        """
        if known := ADAPTERS.get(name):
            if known.text_width != base.text_width:
                raise _of_another(name, known.text_width, base)
            adapter = _fetched(name, known)
        else:
            folder = folder_of(name)
            adapter = cls(name, next(folder.glob("*.safetensors")), folder / ENCODER)
        try:
            with safe_open(adapter.weights, "pt") as opened:
                if "image_proj.proj.weight" not in opened.keys():  # noqa: SIM118  safe_open is no mapping
                    raise InputError(
                        f"{adapter.weights} is no plain IP-Adapter, which makes {TOKENS} words of one embedding of an "
                        "image: those called plus, full or FaceID are not read here"
                    )
                width = opened.get_slice("image_proj.proj.weight").get_shape()[0] // TOKENS
        except (OSError, SafetensorError):
            raise InputError(f"{adapter.weights} is no safetensors file, or a damaged one; save it again") from None
        if width != base.text_width:
            raise _of_another(name, width, base)
        return adapter

    def embeddings(self, images: Sequence[Image.Image], device: torch.device) -> Tensor:
        """(n, D'): one of each image, by the adapter's image encoder."""
        try:
            loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                self.encoder, dtype=torch.float32, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{self.encoder} holds no image encoder that can be read: {_first_line(error)}") from error
        encoder, side = loaded.eval().to(device), loaded.config.image_size
        prepare: Any = CLIPImageProcessor(size=side, crop_size=side)
        pixels = [prepare(image, return_tensors="pt").pixel_values.to(device) for image in images]
        return torch.cat([encoder(each).image_embeds for each in pixels])

    def networks(self, base: BaseModel) -> tuple[nn.Module, Mapping[str, Any]]:
        """What makes words of an embedding, and for each cross-attention layer what makes keys and values of those."""
        state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        with safe_open(self.weights, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                part, _, name = key.partition(".")
                if part in state:
                    state[part][name] = opened.get_tensor(key).float()
        unet: Any = base.unet
        try:
            projection = unet._convert_ip_adapter_image_proj_to_diffusers(state["image_proj"], low_cpu_mem_usage=False)
            processors = unet._convert_ip_adapter_attn_to_diffusers([state], low_cpu_mem_usage=False)
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"the IP-Adapter {self.name!r} has other layers than {base.name!r}: {_first_line(error)}"
            ) from error
        return projection, {path: processors[f"{path}.processor"] for path in _cross_attentions(base)}


def _cross_attentions(base: BaseModel) -> dict[str, Any]:
    """Path in the U-Net -> diffusers' Attention, of those that read text."""
    paths = [name.removesuffix(".processor") for name in base.unet.attn_processors]
    return {path: base.unet.get_submodule(path) for path in paths if path.endswith(".attn2")}


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B, heads, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _fetched(name: str, known: Published) -> Adapter:
    from huggingface_hub import hf_hub_download

    files = (known.weights, f"{known.encoder}/config.json", f"{known.encoder}/model.safetensors")
    try:
        paths = [Path(hf_hub_download(known.repository, file, revision=known.revision)) for file in files]
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise InputError(
            f"the IP-Adapter {name!r} could not be fetched from the hub ({known.repository}); fetch it where there is "
            "a network, or name a folder that holds one"
        ) from error
    return Adapter(name, paths[0], paths[1].parent)


def _of_another(name: str, width: int, base: BaseModel) -> InputError:
    return InputError(
        f"the IP-Adapter {name!r} was trained for base models whose text is {width:,} wide, and that of {base.name!r} "
        f"is {base.text_width:,} wide; no adapter is configured for it: give methods.ip_adapter in params.yaml an "
        "`adapter` that was trained for it, or leave ip_adapter out"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
