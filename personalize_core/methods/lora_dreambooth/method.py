"""DreamBooth by low-rank adaptation (LoRA), by default of the attention projections.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685, under the recipe of
diffusers' DreamBooth LoRA example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Generator, nn

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError
from personalize_core.files.atomic import save_tensors
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.lora_dreambooth.recipe import Config, Target
from personalize_core.methods.shared.interchange import LORA, fill
from personalize_core.methods.shared.lag import apart, attached
from personalize_core.methods.shared.layer_modules import LayerModules, attention_projections, computing, stored
from personalize_core.methods.shared.lora_files import check_held, read_lora, with_rank
from personalize_core.methods.shared.low_rank import LowRank, adding
from personalize_core.methods.shared.merged_weights import merged
from personalize_core.methods.shared.training_batches import with_prior

TEMPLATE = "a photo of {}"


class LoRADreamBooth(Method):
    """A low-rank change to layers of the U-Net, and of the text encoder where the targets name it.

    By default those are the attention projections of the U-Net. The placeholder reads a rare word's embedding.
    """

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        self.changes = _changes(unet_layers(base, config.targets), config.rank)
        self.encoder_changes = _changes(encoder_layers(base, config.targets), config.rank)

    def stages(self) -> list[Stage]:
        c = self.config
        return [Stage("changes", c.steps, c.batch_size, [{"params": list(self.parameters()), "lr": c.lr}])]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        c = self.config
        return with_prior(self, TEMPLATE, images, size, generator, c.prior_weight if c.prior_preservation else None)

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        if not self.training:
            self.config.check(self.sampling)  # an imported artifact may have other targets than params.yaml
        stack = ExitStack()
        stack.enter_context(hooked(*self.encoder_changes.hooks(encoder_layers(base, self.config.targets), adding)))
        if apart(self):
            stack.enter_context(attached(base, self, lambda transformer: self._inside(base, transformer)))
        else:
            stack.enter_context(merged(base, {path: change.merged for path, change in self.changes.by_path()}))
        return stack

    @contextmanager
    def _inside(self, base: BaseModel, transformer: str) -> Iterator[None]:
        layers: dict[str, Any] = dict(unet_layers(base, self.config.targets, [transformer]))
        summed = {path: layer for path, layer in layers.items() if self.changes.of(path).cheaper_summed(layer)}
        beside = {path: layer for path, layer in layers.items() if path not in summed}
        forwards = {layer: self.changes.of(path).summed(layer) for path, layer in summed.items()}
        with hooked(*self.changes.hooks(beside, adding)), computing(forwards):
            yield

    def export(self, base: BaseModel, folder: Path) -> str:
        tensors = {}
        encoder = encoder_layers(base, self.config.targets)
        for part, layers, changes in (
            ("unet", unet_layers(base, self.config.targets), self.changes),
            ("text_encoder", encoder, self.encoder_changes),
        ):
            for path, change in changes.by_path():
                axes = (1,) * (layers[path].weight.ndim - 2)  # 1 x 1, of a convolution
                tensors[f"{part}.{path}.lora_A.weight"] = change.A.reshape(*change.A.shape, *axes)
                tensors[f"{part}.{path}.lora_B.weight"] = change.B.reshape(*change.B.shape, *axes)
        save_tensors(folder / LORA, tensors)
        said = f"{base.tokenizer.rare_word} {self.concept.class_noun}"
        return f'pipe.load_lora_weights("pytorch_lora_weights.safetensors"), and write {said!r} in prompts.'

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> LoRADreamBooth:
        """The targets are those that the file changes; layers of them that it leaves alone are left alone.

        All get the rank of the largest.
        """
        found = read_lora(path, base)
        of_text = [*found.text_encoder, *found.text_encoder_2]
        if of_text and len(base.text_encoders) > 1:
            raise InputError(
                f"{path} changes layers of the text encoders, such as {of_text[0]}, and on Stable Diffusion XL this "
                "method changes the U-Net's alone; train the LoRA on the U-Net alone, which kohya's trainer calls "
                "--network_train_unet_only"
            )
        targets = tuple(
            target
            for target in get_args(Target)
            if unet_layers(base, [target]).keys() & found.unet.keys()
            or encoder_layers(base, [target]).keys() & found.text_encoder.keys()
        )
        known = {**unet_layers(base, targets), **encoder_layers(base, targets)}
        check_held(found.paths(), known, path, "the layers of transformers and of the text encoder")
        ranks = [len(A) for A, _ in [*found.unet.values(), *found.text_encoder.values()]]
        method = cls(dataclasses.replace(config, rank=max(ranks), targets=targets), base, concept)
        for part, changes in ((method.changes, found.unet), (method.encoder_changes, found.text_encoder)):
            tensors = {name: torch.zeros_like(start) for name, start in part.named_parameters()}
            for layer, factors in changes.items():
                A, B = with_rank(*factors, max(ranks), path)
                tensors |= {f"{stored(layer)}.A": A, f"{stored(layer)}.B": B}
            fill(part.named_parameters(), tensors, path)
        return method


def unet_layers(
    base: BaseModel, targets: Iterable[Target], transformers: Iterable[str] | None = None
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Path in the U-Net -> layer, of those that the targets name, in some of its transformers or all."""
    paths = list(base.transformers if transformers is None else transformers)
    found: dict[str, Any] = dict(attention_projections(base, paths)) if "attention" in targets else {}
    in_block = ("ff.net.0.proj", "ff.net.2") if "feed_forward" in targets else ()
    around = ("proj_in", "proj_out") if "projections" in targets else ()
    for path in paths:
        for block in base.blocks_of([path]):
            found |= {f"{block.path}.{name}": block.module.get_submodule(name) for name in in_block}
        found |= {f"{path}.{name}": base.transformers[path].get_submodule(name) for name in around}
    return found


def encoder_layers(base: BaseModel, targets: Iterable[Target]) -> dict[str, nn.Linear]:
    """Path in the text encoder -> layer: the projections of its attention and its feed-forward layers, if named."""
    if "text_encoder" not in targets:
        return {}
    return {
        path: layer
        for encoder in base.text_encoders.values()
        for path, layer in encoder.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _changes(layers: dict[str, Any], rank: int) -> LayerModules[LowRank]:
    shapes = {path: layer.weight.shape for path, layer in layers.items()}
    return LayerModules({path: LowRank(shape[1], shape[0], rank) for path, shape in shapes.items()})
