"""What several methods are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Generator, Tensor, nn

from personalize_core.base_model.layers import LAYERS
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning
from personalize_core.concepts.concept import SLOT
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Batch, Method, equal_shares
from personalize_core.methods.shared.interchange import elsewhere, save_embedding
from personalize_core.methods.shared.options import TokenRule


class ConceptEmbedding(nn.Module):
    """The learned input embedding of the placeholder, (D,) in float32.

    With `learned` false it stays as it is: kept in the artifact, but not among what was learned.
    """

    vector: Tensor
    initial: Tensor

    def __init__(self, initial: Tensor, learned: bool = True) -> None:
        super().__init__()
        vector = initial.detach().clone().float()
        # Base model and concept say it again, so neither artifact nor checkpoint keeps it.
        self.register_buffer("initial", vector.clone(), persistent=False)
        if learned:
            self.vector = nn.Parameter(vector)
        else:
            self.register_buffer("vector", vector)

    def metrics(self) -> dict[str, float]:
        """See `Method.metrics`."""
        return drift(self.vector, self.initial) if isinstance(self.vector, nn.Parameter) else {}

    @contextmanager
    def reading(self, vector: Tensor) -> Iterator[None]:
        """Within it, `vector` is another: (D,), or (B, 1, D) for each row of a prompt batch its own."""
        tensors: Any = self._parameters if "vector" in self._parameters else self._buffers
        own, tensors["vector"] = tensors["vector"], vector
        try:
            yield
        finally:
            tensors["vector"] = own


@torch.no_grad()
def drift(vectors: Tensor, initial: Tensor) -> dict[str, float]:
    """The norm |v| of a learned embedding and its cosine to what it started as; means, where there are several.

    Args:
        vectors: (..., D).
        initial: (D,).
    """
    both = [vectors.norm(dim=-1).mean(), F.cosine_similarity(vectors, initial, dim=-1).mean()]
    norm, cosine = torch.stack(both).tolist()  # one wait for the device
    return {"v_norm": norm, "v_cosine": cosine}


class TunedWeights(nn.Module):
    """Trainable float32 copies of some of a model's tensors, put in the originals' place for a while.

    The originals are never written to, so the base model comes out bit for bit as it went in; the price is a
    second copy in memory.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        originals = dict(model.named_parameters())
        # A parameter's name may not hold a dot, so "conv_in.weight" is kept as "conv_in/weight".
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(originals[name].detach().clone().float()) for name in names}
        )

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, weight)."""
        return ((key.replace("/", "."), weight) for key, weight in self.weights.items())

    @contextmanager
    def placed_in(self, model: nn.Module, under: str = "") -> Iterator[None]:
        """Within it, `model` computes with these weights, and gradients reach them; those whose names start so."""
        with _placed(((name, weight) for name, weight in self.items() if name.startswith(under)), model):
            yield

    def as_state_dict(self) -> dict[str, Tensor]:
        """The tensors under the names they have in the model."""
        return {name: weight.detach() for name, weight in self.items()}


class KeptWeights(nn.Module):
    """A copy of some of a model's tensors as they were at one moment of training; buffers, so nothing trains them."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        originals = dict(model.named_parameters())
        for name in names:
            self.register_buffer(name.replace(".", "/"), originals[name].detach().clone().float())

    def keep(self, tuned: TunedWeights) -> None:
        """Copy the tensors as they are now."""
        now = tuned.as_state_dict()
        for key, kept in self.named_buffers():
            kept.copy_(now[key.replace("/", ".")])

    @contextmanager
    def placed_in(self, model: nn.Module) -> Iterator[None]:
        """Within it, `model` computes with these weights."""
        with _placed(((key.replace("/", "."), kept) for key, kept in self.named_buffers()), model):
            yield


@contextmanager
def _placed(weights: Iterable[tuple[str, Tensor]], model: nn.Module) -> Iterator[None]:
    originals: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for name, weight in weights:
            path, _, leaf = name.rpartition(".")
            owner: Any = model.get_submodule(path)
            originals.append((owner, leaf, owner._parameters[leaf]))
            owner._parameters[leaf] = weight
        yield
    finally:
        for owner, leaf, original in originals:
            owner._parameters[leaf] = original


def with_prior(
    method: Method, template: str, images: ConceptLatents, size: int, generator: Generator, prior_weight: float | None
) -> Batch:
    """`size` images of the concept, then as many of its class noun (prior preservation, eq. 2 of DreamBooth).

    The two means of the loss are taken separately, each over its own rows; the second counts `prior_weight`.
    Without a weight there are no rows of the class noun.
    """
    latents, prompts, weight = images.instances(size, generator), [method.say(template)] * size, equal_shares(size)
    if prior_weight is None:
        return Batch(latents, prompts, weight)
    return Batch(
        latents=torch.cat([latents, images.prior(size, generator)]),
        prompts=prompts + [template.replace(SLOT, method.concept.class_noun)] * size,
        weight=torch.cat([weight, equal_shares(size, prior_weight)]),
    )


def from_templates(
    method: Method, templates: Sequence[str], images: ConceptLatents, size: int, generator: Generator
) -> Batch:
    """`size` images of the concept, each under a template drawn uniformly."""
    chosen = torch.randint(len(templates), (size,), generator=generator).tolist()
    prompts = [method.say(templates[int(index)]) for index in chosen]
    return Batch(images.instances(size, generator), prompts, equal_shares(size))


class EmbeddingAndUNet(Method):
    """A method that learns the placeholder's embedding and weights of the U-Net, and all that follows from that.

    A subclass creates both; its recipe inherits EmbeddingAndUNetRecipe.
    """

    embedding: ConceptEmbedding
    unet: TunedWeights

    def condition(self, base: BaseModel, prompts: Sequence[str]) -> Conditioning:
        context = base.encode(prompts, self.concept, self.embedding.vector)
        return lambda t: context

    def attach(self, base: BaseModel) -> AbstractContextManager[Any]:
        return self.unet.placed_in(base.unet)

    def export(self, base: BaseModel, folder: Path) -> str:
        """The embedding, and the U-Net if any of its weights were tuned."""
        steps = []
        if self.unet.weights:
            whole: Any = UNet2DConditionModel.from_config(base.unet.config)
            whole.load_state_dict(base.unet.state_dict() | self.unet.as_state_dict())
            whole.save_pretrained(folder / "unet")
            steps.append('Load the pipeline with unet=UNet2DConditionModel.from_pretrained("unet").')
        steps.append(save_embedding(self.embedding.vector, self.concept, folder))
        return f"{' '.join(steps)}, and write {self.phrase!r} in prompts. {elsewhere(self.concept)}"


def class_embedding(base: BaseModel, class_noun: str, rule: TokenRule) -> Tensor:
    """(D,): the input embedding that stands for a class noun, which may have several tokens."""
    tokens = len(base.tokenizer.class_noun_ids(class_noun))
    embeddings = [base.word_embedding(class_noun, token) for token in range(tokens)]
    return {"last": embeddings[-1], "first": embeddings[0], "mean": torch.stack(embeddings).mean(dim=0)}[rule]


def attention_projections(base: BaseModel, transformers: Iterable[str] = LAYERS) -> dict[str, nn.Linear]:
    """Path in the U-Net -> layer: queries, keys, values and outputs of both attentions, in all 16 transformers."""
    found = {}
    for path in transformers:
        block = base.transformers[path]
        for kind in ("attn1", "attn2"):
            attention: Any = block.transformer_blocks[0].get_submodule(kind)
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                found[f"{path}.transformer_blocks.0.{kind}.{name}"] = attention.get_submodule(name)
    return found


def parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def count(module: nn.Module) -> int:
    """How many numbers the module learns."""
    return sum(parameter.numel() for parameter in module.parameters())
