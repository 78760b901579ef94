"""Test-time optimization: the learned embedding is refined for each prompt by CoRe's context losses.

Wu et al., "CoRe: Context-Regularized Text Embedding Learning for Text-to-Image Personalization", AAAI 2025,
arXiv:2408.15914, section "Test-time optimization". It works on every method that learns one text embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning
from personalize_core.concepts.concept import SLOT
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding
from personalize_core.methods.shared.context_regularizer import PromptPair, context_losses
from personalize_core.methods.shared.options import Refinement
from personalize_core.randomness import generator_for

Progress = Callable[[int, int, float], None]
"""(steps done, steps, the loss before the last of them) -> None"""


class ContextRefined(Method):
    """A trained method whose embedding is refined for each prompt that it samples.

    It wraps any method that learns one text embedding, is used for sampling like any method, and overrides `condition`
    alone: that is where a prompt first meets a method. The embedding takes some steps down the context losses of the
    prompt itself, with the method's other weights in place and frozen, without diffusion loss and rescaling; which
    noisy latents the attention is compared under the paper leaves open, and the code takes the training images'.
    What was learned is not changed. A prompt's embedding depends on the seed and the prompt alone, not on the image
    or on the other prompts, and is computed once.
    """

    def __init__(self, method: Method, images: ConceptLatents, seed: int, refinement: Refinement | None = None) -> None:
        """images: the concept's latents, as for training.

        Raises:
            InputError: the method learns no text embedding, or several.
        """
        nn.Module.__init__(self)
        self.embedding_name = embedding_name(method)
        self.method, self.images, self.seed = method, images, seed
        self.config, self.concept = refinement or Refinement(), method.concept
        self.refined: dict[str, Tensor] = {}  # prompt -> (D,)
        self.losses: dict[str, list[float]] = {}  # prompt -> the loss before each step, each under its own noise

    @property
    def phrase(self) -> str:
        return self.method.phrase

    @property
    def sampling(self) -> Any:
        return self.method.sampling

    @sampling.setter
    def sampling(self, chosen: Any) -> None:
        self.method.sampling = chosen

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        return self.method.attach(base)

    def refine(self, base: BaseModel, prompts: Sequence[str], progress: Progress) -> None:
        """Refine for these prompts now, rather than for each when it is first sampled."""
        wanted = [prompt for prompt in dict.fromkeys(prompts) if self._speaks_of_it(prompt)]
        wanted = [prompt for prompt in wanted if prompt not in self.refined]
        steps = len(wanted) * self.config.steps
        with self.attach(base):
            for number, prompt in enumerate(wanted):
                done = number * self.config.steps
                self.refined[prompt] = self._refine(
                    base, prompt, lambda index, loss, done=done: progress(done + index + 1, steps, loss)
                )

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        """The prompts with each its own embedding; prompts that do not name the concept are left to the method.

        To be called with the method attached, as the sampler does, so that it looks at the U-Net that samples.
        """
        vectors = torch.stack([self._vector(base, prompt) for prompt in prompts])[:, None]  # (B, 1, D)
        with self.embedding.reading(vectors):
            inner = self.method.condition(base, prompts)

        def conditioning(t: Tensor) -> Any:
            with self.embedding.reading(vectors):
                return inner(t)

        return conditioning

    @property
    def embedding(self) -> ConceptEmbedding:
        embedding: Any = self.method.get_submodule(self.embedding_name)
        return embedding

    def _vector(self, base: BaseModel, prompt: str) -> Tensor:
        if not self._speaks_of_it(prompt):
            return self.embedding.vector.detach()
        if prompt not in self.refined:
            self.refined[prompt] = self._refine(base, prompt)
        return self.refined[prompt]

    def _speaks_of_it(self, prompt: str) -> bool:
        return self.concept.placeholder in prompt

    @torch.enable_grad()  # sampling runs without
    def _refine(
        self, base: BaseModel, prompt: str, listen: Callable[[int, float], None] = lambda index, loss: None
    ) -> Tensor:
        how = self.config
        whole = re.compile(rf"{re.escape(self.phrase)}(?![\w-])")  # "<v> dog", and not the beginning of "<v> doghouse"
        if whole.search(prompt):
            template, phrase = whole.sub(lambda found: SLOT, prompt), self.phrase
        else:
            template, phrase = prompt.replace(self.concept.placeholder, SLOT), self.concept.placeholder
        pair = PromptPair.of(base, self.concept, template, phrase)
        vector = self.embedding.vector.detach().clone().requires_grad_()
        optimizer, seen = torch.optim.AdamW([vector], lr=how.lr), []
        for index in range(how.steps):
            x_t, t = self._noisy(base, generator_for(self.seed, "refine", prompt, index))
            with self.embedding.reading(vector):
                condition = self.method.condition(base, [prompt] * how.batch_size)
                losses = context_losses(how, base, self.concept, pair, condition, x_t, t)
            total = torch.stack(list(losses.values())).sum()
            if not total.isfinite():
                raise FloatingPointError(f"test-time optimization, step {index}: the loss is {total.item()}")
            (vector.grad,) = torch.autograd.grad(total, vector)  # and into nothing that the method learned
            optimizer.step()
            seen.append(total.item())
            listen(index, seen[-1])
        self.losses[prompt] = seen
        return vector.detach()

    def _noisy(self, base: BaseModel, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training images, noised to random timesteps: (B, 4, h, w) and (B,)."""
        latents = self.images.instances(self.config.batch_size, generator)
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(base.scheduler.config.num_train_timesteps, (len(noise),), generator=generator)
        return base.scheduler.add_noise(latents, noise, t).to(base.device), t.to(base.device)


def embedding_name(method: Method) -> str:
    """Where in the method its one learned embedding is.

    Raises:
        InputError: there is none, or there are several.
    """
    found = [name for name, module in method.named_modules() if isinstance(module, ConceptEmbedding)]
    if len(found) != 1:
        what = "no text embedding" if not found else f"{len(found)} text embeddings"
        why = "there is nothing to refine for a prompt" if not found else "it is not said which to refine for a prompt"
        raise InputError(f"{type(method).__name__} learns {what}, so {why}")
    return found[0]
