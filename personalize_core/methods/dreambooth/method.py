"""DreamBooth, with and without prior preservation.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", CVPR 2023,
arXiv:2208.12242. The paper's model is Imagen, and no code for it is known to us; for Stable
Diffusion we follow diffusers' recipe.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Generator
from transformers import CLIPTextModel

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError, listed
from personalize_core.methods.dreambooth.recipe import Config
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.shared.interchange import fill, read_network
from personalize_core.methods.shared.training_batches import with_prior
from personalize_core.methods.shared.tuned_weights import TunedWeights, parameter_names

TEMPLATE = "a photo of {}"  # sec. 3.2: "a [V] [class noun]"; the wording is the recipe's


class DreamBooth(Method):
    """Every weight of the U-Net, and of the text encoder if wished; the placeholder reads a rare token's embedding.

    Prior preservation (eq. 2) is rows of class images whose loss counts with `prior_weight`: the two means are
    taken separately, each over its own rows.
    """

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.unet = TunedWeights(base.unet, parameter_names(base.unet), base.unrounded)
        encoder = first_text_encoder(base)
        self.text_encoder = TunedWeights(encoder, parameter_names(encoder) if config.train_text_encoder else [])

    def stages(self) -> list[Stage]:
        c = self.config
        return [Stage("weights", c.steps, c.batch_size, [{"params": list(self.parameters()), "lr": c.lr}])]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        c = self.config
        return with_prior(self, TEMPLATE, images, size, generator, c.prior_weight if c.prior_preservation else None)

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(self.unet.placed_in(base.unet))
        stack.enter_context(self.text_encoder.placed_in(first_text_encoder(base)))
        return stack

    def export(self, base: BaseModel, folder: Path) -> str:
        tuned: Any = UNet2DConditionModel.from_config(base.unet.config)
        tuned.load_state_dict(self.unet.as_state_dict())
        tuned.save_pretrained(folder / "unet")
        how = 'unet=UNet2DConditionModel.from_pretrained("unet")'
        if self.config.train_text_encoder:
            encoder = CLIPTextModel(first_text_encoder(base).config)
            encoder.load_state_dict(self.text_encoder.as_state_dict())
            encoder.save_pretrained(folder / "text_encoder")
            how += ', text_encoder=CLIPTextModel.from_pretrained("text_encoder")'
        said = f"{base.tokenizer.rare_word} {self.concept.class_noun}"
        return f"Load the pipeline with {how}, and write {said!r} in prompts."

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> DreamBooth:
        """A U-Net's folder, or a pipeline's; a text encoder beside it that is not the base model's counts as tuned."""
        unet, tuned = (path / "unet" if (path / "unet").is_dir() else path), {}
        for part, network in base.text_encoders.items():
            found = read_network(network, path / part) if (path / part).is_dir() else {}
            own = network.state_dict()
            if any(name not in own or not torch.equal(tensor, own[name].cpu()) for name, tensor in found.items()):
                tuned[part] = found
        if tuned and len(base.text_encoders) > 1:
            raise InputError(
                f"{path}: {listed(tuned)} differ from the base model's, and on Stable Diffusion XL this method changes "
                "the U-Net alone; import a model whose text encoders were left as they were"
            )
        method = cls(dataclasses.replace(config, train_text_encoder=bool(tuned)), base, concept)
        fill(method.unet.items(), read_network(base.unet, unet), unet)
        for part, found in tuned.items():
            fill(method.text_encoder.items(), found, path / part)
        return method


def first_text_encoder(base: BaseModel) -> Any:
    """The only one, where it may be trained: `Config.needs_one_text_encoder`."""
    return next(iter(base.text_encoders.values()))
