"""CoRe: context-regularized text embedding learning.

Wu et al., "CoRe: Context-Regularized Text Embedding Learning for Text-to-Image Personalization", AAAI 2025,
arXiv:2408.15914; its first version holds the hyper-parameters. Where paper and released code differ we follow the
code, since the weights were tuned with it; the paper's readings are `cer_axis: feature`, `car_pool: all` and
`rotate: false`.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import torch
from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import SLOT, Concept
from personalize_core.concepts.prompt_lists import TRAINING, read_list
from personalize_core.errors import InputError
from personalize_core.methods.core.recipe import Config
from personalize_core.methods.interface import Stage, Step
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding, class_embedding
from personalize_core.methods.shared.context_regularizer import PromptPair, context_losses
from personalize_core.methods.shared.embedding_and_unet import EmbeddingAndUNet
from personalize_core.methods.shared.tuned_weights import TunedWeights, parameter_names

# A class noun with one of these words gets the prompts for animate concepts, where things wear hats and recite
# poetry. The authors choose by hand, and take a doll for animate; so do we any figure of a living thing.
ANIMATE = frozenset(
    "animal ape baby bear bee bird boy bull butterfly calf cat chicken child cow crab creature deer dinosaur dog doll "
    "dolphin donkey dragon duck duckling eagle elephant figure figurine fish fox frog giraffe girl goat goose hamster "
    "hedgehog hen hippo horse insect kangaroo kitten koala lamb leopard lion lizard man monkey monster mouse octopus "
    "otter owl panda parrot pegasus penguin person pet pig pigeon pony puppy rabbit raccoon rat robot rooster shark "
    "sheep sloth snake squirrel swan tiger toucan turtle unicorn walrus whale wolf woman zebra".split()
)


class CoRe(EmbeddingAndUNet):
    """The embedding under context regularization, then the whole U-Net without it.

    In prompts the placeholder stands alone, without a class noun. A new optimizer for each stage, no prior
    preservation. No gradient is clipped: the code's call names tensors that are not trained.
    """

    Config = Config
    norm: Tensor

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        initial = class_embedding(base, concept.class_noun, config.class_token_rule)
        self.embedding = ConceptEmbedding(initial, learned=config.embedding_steps > 0)
        self.unet = TunedWeights(base.unet, parameter_names(base.unet) if config.unet_steps else [], base.unrounded)
        self.widths = base.text_encoders.widths
        self.register_buffer("norm", self._norms())  # see rescale
        self.templates = self._readable(base, read_list(TRAINING / f"{prompt_set(config, concept)}.txt"))

    @property
    def phrase(self) -> str:
        return self.concept.placeholder

    def stages(self) -> list[Stage]:
        c = self.config
        embedding = {"params": list(self.embedding.parameters()), "lr": c.embedding_lr}
        unet = {"params": list(self.unet.parameters()), "lr": c.unet_lr}
        both = [
            Stage(
                "embedding",
                c.embedding_steps,
                c.embedding_batch_size,
                [embedding],
                after_step=self.rescale,
                least_steps=c.rescaled_steps[1] if c.rescale else 0,
                max_gradient_norm=math.inf,
                later_penalty=self.context_penalty,
                attach=lambda base: nullcontext(),  # the U-Net is still the base model's
            ),
            Stage("unet", c.unet_steps, c.unet_batch_size, [unet], max_gradient_norm=math.inf),
        ]
        return [stage for stage in both if stage.steps]

    def context_penalty(self, step: Step) -> dict[str, Tensor]:
        """Eq. 3 and 4, under the noisy latents of the diffusion loss and one template for the whole batch."""
        how: Config = self.config
        if not (how.cer_weight or how.car_weight):
            return {}
        chosen = int(torch.randint(len(self.templates), (), generator=step.generator))
        pair = PromptPair.of(step.base, self.concept, self.templates[chosen], self.phrase)
        if how.regularized == "concept":
            pair, how = (
                pair.of_the_concept(),
                dataclasses.replace(how, cer_axis="feature" if how.cer_weight else "token"),
            )
        condition = self.condition(step.base, [pair.concept_prompt] * len(step.t))
        return context_losses(
            how, step.base, self.concept, pair, condition, step.x_t, step.t, step.share, step.context.sizes
        )

    @torch.no_grad()
    def rescale(self, index: int) -> None:
        """After steps 121 to 180 of 300, give the embedding the norm that it had after step 120, as the code does.

        The paper takes the norm before each step, which within the window is the same. `index` counts from 0. The
        optimizer's moments are left alone. Where the window begins with the stage, the norm stays that of the class
        noun. Of a pair of embeddings each keeps its own norm, which is ours.
        """
        done, (first, last) = index + 1, self.config.rescaled_steps
        if done <= first:
            self.norm.copy_(self._norms())
        elif self.config.rescale and done <= last:
            for part, norm in zip(self.embedding.vector.split(self.widths), self.norm.flatten(), strict=True):
                part.mul_(norm / part.norm())

    def _norms(self) -> Tensor:
        """(): of the embedding; or (2,), of both of a pair."""
        norms = [part.norm() for part in self.embedding.vector.detach().split(self.widths)]
        return norms[0] if len(norms) == 1 else torch.stack(norms)

    def _readable(self, base: BaseModel, templates: list[str]) -> list[str]:
        """Those that a prompt has room for: all, but for base models that know few words and so need many tokens."""

        def readable(template: str) -> bool:
            try:
                base.tokenizer([template.replace(SLOT, said) for said in (self.phrase, noun)], self.concept)
            except InputError:
                return False
            return True

        noun = self.concept.class_noun
        kept = [template for template in templates if readable(template)]
        if not kept:
            raise InputError(f"prompt_set = {self.config.prompt_set!r}: this base model can read none of its prompts")
        return kept


def prompt_set(config: Config, concept: Concept) -> str:
    """The name of the list of regularization prompts."""
    if config.prompt_set != "by_kind":
        return config.prompt_set
    return "core_animate" if ANIMATE & set(concept.class_noun.lower().split()) else "core_inanimate"
