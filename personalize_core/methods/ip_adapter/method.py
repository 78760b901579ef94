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
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.pretrained import load_network
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.files.hub import hub_files
from personalize_core.methods.interface import Method, Stage
from personalize_core.methods.ip_adapter.recipe import ADAPTERS, ENCODER, Config, Published, folder_of
from personalize_core.methods.shared.interchange import check_shapes, read_tensors
from personalize_core.methods.shared.layer_modules import LayerModules

TOKENS = 4  # that an image becomes (sec. 3.2)
PARTS = ("image_proj.", "ip_adapter.")  # of an adapter's file
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
        Adapter.read(self.config.adapter, base)

    @torch.no_grad()
    def see(self, images: Sequence[Image.Image], base: BaseModel) -> None:
        """See `interface.SeesImages`. Of several images the embeddings are averaged."""
        adapter = Adapter.read(self.config.adapter, base)
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
    """An adapter and its image encoder, read whole: they fit each other and the base model."""

    tensors: Mapping[str, Tensor]
    encoder: Any

    @classmethod
    def read(cls, name: str, base: BaseModel) -> Adapter:
        """The adapter of this name, or in this folder; fetched from the hub at its pinned commit.

        Raises:
            InputError: it cannot be had, it is none of the plain kind or of another base model or image encoder, or a
                file is damaged or lacks something.
        """
        if known := ADAPTERS.get(name):
            if known.text_width != base.text_width:
                raise _of_another(name, known.text_width, base)
            file, folder = _fetched(name, known)
        else:
            file, folder = next(folder_of(name).glob("*.safetensors")), folder_of(name) / ENCODER
        tensors = {key: each for key, each in read_tensors(file).items() if key.startswith(PARTS)}
        projection = tensors.get("image_proj.proj.weight")
        if projection is None or projection.ndim != 2:
            raise InputError(
                f"{file} is no plain IP-Adapter, which makes {TOKENS} words of one embedding of an image: those called "
                "plus, full or FaceID are not read here"
            )
        if (width := len(projection) // TOKENS) != base.text_width:
            raise _of_another(name, width, base)
        encoder = load_network(CLIPVisionModelWithProjection, folder)
        if projection.shape[1] != encoder.config.projection_dim:
            raise InputError(
                f"{file} reads embeddings of images that are {projection.shape[1]:,} wide, and those of {folder} are "
                f"{encoder.config.projection_dim:,} wide; put there the image encoder that the adapter was trained with"
            )
        check_shapes(_shapes(base, encoder.config.projection_dim), tensors, file)
        return cls(tensors, encoder)

    def embeddings(self, images: Sequence[Image.Image], device: torch.device) -> Tensor:
        """(n, D'): one of each image, by the adapter's image encoder."""
        encoder, side = self.encoder.to(device), self.encoder.config.image_size
        prepare: Any = CLIPImageProcessor(size=side, crop_size=side)
        pixels = [prepare(image, return_tensors="pt").pixel_values.to(device) for image in images]
        return torch.cat([encoder(each).image_embeds for each in pixels])

    def networks(self, base: BaseModel) -> tuple[nn.Module, Mapping[str, Any]]:
        """What makes words of an embedding, and for each cross-attention layer what makes keys and values of those."""
        state = {
            part.removesuffix("."): {
                key.removeprefix(part): each.float() for key, each in self.tensors.items() if key.startswith(part)
            }
            for part in PARTS
        }
        unet: Any = base.unet
        projection = unet._convert_ip_adapter_image_proj_to_diffusers(state["image_proj"], low_cpu_mem_usage=False)
        processors = unet._convert_ip_adapter_attn_to_diffusers([state], low_cpu_mem_usage=False)
        return projection, {path: processors[f"{path}.processor"] for path in _cross_attentions(base)}


def _shapes(base: BaseModel, embedding: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors of an adapter for the base model; the authors number the U-Net's attentions, every second of which
    reads text."""
    width, shapes = base.text_width, {}
    for index, layer in enumerate(_cross_attentions(base).values()):
        for name in ("to_k_ip", "to_v_ip"):
            shapes[f"ip_adapter.{2 * index + 1}.{name}.weight"] = (layer.to_k.out_features, width)
    return shapes | {
        "image_proj.proj.weight": (TOKENS * width, embedding),
        "image_proj.proj.bias": (TOKENS * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }


def _cross_attentions(base: BaseModel) -> dict[str, Any]:
    """Path in the U-Net -> diffusers' Attention, of those that read text."""
    paths = [name.removesuffix(".processor") for name in base.unet.attn_processors]
    return {path: base.unet.get_submodule(path) for path in paths if path.endswith(".attn2")}


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B, heads, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _fetched(name: str, known: Published) -> tuple[Path, Path]:
    """Its file of weights, and its image encoder's folder."""
    weights, config, _ = hub_files(
        f"the IP-Adapter {name!r}",
        known.repository,
        known.revision,
        (known.weights, f"{known.encoder}/config.json", f"{known.encoder}/model.safetensors"),
        "or name a folder that holds one as `adapter`",
    )
    return weights, config.parent


def _of_another(name: str, width: int, base: BaseModel) -> InputError:
    fitting = [f"`adapter: {known}`" for known, of in ADAPTERS.items() if of.text_width == base.text_width]
    instead = " or ".join([*fitting, "the folder of an `adapter` that was trained for it"])
    return InputError(
        f"the IP-Adapter {name!r} was trained for base models whose text is {width:,} wide, and that of {base.name!r} "
        f"is {base.text_width:,} wide; give methods.ip_adapter in params.yaml {instead}, or leave ip_adapter out"
    )
