"""The learned input embedding of the placeholder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personalize_core.base_model.model import BaseModel
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

    def metrics(self) -> dict[str, Tensor]:
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
def drift(vectors: Tensor, initial: Tensor) -> dict[str, Tensor]:
    """The norm |v| of a learned embedding and its cosine to what it started as; means, where there are several.

    Args:
        vectors: (..., D).
        initial: (D,).
    """
    norm, cosine = vectors.norm(dim=-1).mean(), F.cosine_similarity(vectors, initial, dim=-1).mean()
    return {"v_norm": norm, "v_cosine": cosine}


def class_embedding(base: BaseModel, class_noun: str, rule: TokenRule) -> Tensor:
    """(D,): the input embedding that stands for a class noun, which may have several tokens."""
    tokens = len(base.tokenizer.class_noun_ids(class_noun))
    embeddings = [base.word_embedding(class_noun, token) for token in range(tokens)]
    return {"last": embeddings[-1], "first": embeddings[0], "mean": torch.stack(embeddings).mean(dim=0)}[rule]
