"""What the text encoder reads in the placeholder's place, before, during and after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personalize_core.analyses.findings import NotDefined
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.prompt_variants import part_of
from personalize_core.methods.interface import Method

LOOKS = 20  # during a training
MIDDLE = 500  # of the 1000 timesteps, for an embedding that differs between them
WORDS = 8
TOLERANCE = 1e-4  # relative; what is read is known to rounding


@torch.no_grad()
def what_is_read(method: Method, base: BaseModel, t: int = MIDDLE) -> Tensor:
    """The input embeddings that the text encoder reads for the placeholder alone, at timestep t: (n, D) on the CPU.

    n is 1, or 16 where each cross-attention layer has its own. Whatever a method does to the text encoder's input
    shows here, so none is asked for by name. Known to rounding, since position embeddings are taken off again.

    Raises:
        NotDefined: the method's prompts have no placeholder.
    """
    if not has_placeholder(method):
        raise NotDefined(
            "the method's prompts name the concept by its class noun alone, so there is no placeholder to read"
        )
    with method.attach(base):
        return _read_attached(method, base, t)


def has_placeholder(method: Method) -> bool:
    """Does the phrase of the method hold the placeholder?"""
    return method.concept.placeholder in method.phrase


@torch.no_grad()
def _read_attached(method: Method, base: BaseModel, t: int = MIDDLE) -> Tensor:
    """`what_is_read` of a method that is attached already."""
    prompt, seen = [method.concept.placeholder], []
    place = int(base.tokenizer(prompt, method.concept).placeholder[0].int().argmax())
    encoders: list[Any] = list(base.text_encoders.values())
    inputs: list[Any] = [part_of(encoder, "embeddings") for encoder in encoders]

    def look(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output[:, place] - module.position_embedding.weight[place])

    with hooked(*(embeddings.register_forward_hook(look) for embeddings in inputs)):
        method.condition(base, prompt)(torch.full((1,), t, device=base.device))
    return torch.cat(seen[-len(inputs) :], dim=-1).float().cpu()


def both_ends(start: Method, trained: Method, base: BaseModel) -> tuple[np.ndarray, np.ndarray]:
    """`what_is_read` before and after training, both (n, D) float64, row for row.

    Raises:
        NotDefined: training changed nothing there.
    """
    before, after = (what_is_read(method, base).double().numpy() for method in (start, trained))
    if np.allclose(before, after, rtol=0, atol=TOLERANCE * float(np.abs(before).max())):
        raise NotDefined(
            "the method learns no embedding: what the text encoder reads for the placeholder is the same before and "
            "after training"
        )
    return before, after


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N, M) of rows (N, D) with rows (M, D), of any norm but 0."""
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    return np.clip(one @ other.T, -1, 1)


def vocabulary(base: BaseModel) -> tuple[list[str], np.ndarray]:
    """Its whole words of plain letters, and their input embeddings, (V, D) float64; without those that are all 0."""
    words, ids = whole_words(base)
    return words, base.text_encoders.embeddings(ids).double().cpu().numpy()


def whole_words(base: BaseModel) -> tuple[list[str], list[int]]:
    """The same words, and their places in the table of input embeddings."""
    # The tokenizer's own dictionary, a private attribute: PromptTokenizer's public methods only lead from word to id.
    ids: dict[str, int] = base.tokenizer._tokenizer.get_vocab()
    there = base.text_encoders.vocabulary.any(dim=1).tolist()
    found = {token.removesuffix("</w>"): i for token, i in ids.items() if token.endswith("</w>") and i < len(there)}
    words = [word for word in sorted(found) if word.isascii() and word.isalpha() and there[found[word]]]
    return words, [found[word] for word in words]


def nearest_words(
    vectors: np.ndarray, table: np.ndarray, words: Sequence[str], count: int = WORDS
) -> list[list[tuple[str, float]]]:
    """For each row of `vectors`, (n, D), the words whose rows of `table`, (V, D), have the greatest cosine."""
    alike = cosines(vectors, table)
    order: list[list[int]] = np.argsort(-alike, axis=1, kind="stable")[:, :count].tolist()
    return [[(words[j], float(alike[i, j])) for j in row] for i, row in enumerate(order)]


@contextmanager
def _in_eval_mode(method: Method) -> Iterator[None]:
    """Within it the method is in eval mode: nothing is dropped out, and no random number is taken."""
    learning = method.training
    method.eval()
    try:
        yield
    finally:
        method.train(learning)


class WhileTraining:
    """Looks at what is read for the placeholder while a method learns; it changes nothing of the training.

    What the vocabulary takes stays where it is, so that a look costs no memory to speak of.
    """

    def __init__(self, method: Method, base: BaseModel, total: int) -> None:
        """method: as its training starts, on the base model's device and not attached. total: steps of all stages."""
        self.method, self.base, self.total = method, base, total
        self.every = max(1, -(-total // LOOKS))
        self.start: Tensor | None = None
        if has_placeholder(method):
            with method.attach(base), _in_eval_mode(method):
                self.start = _read_attached(method, base)
        self.words: list[str] = []
        self.norms = self.ids = torch.empty(0)

    def __call__(self, done: int) -> dict[str, Any] | None:
        """For the log after `done` steps of the whole training, of a method that is attached.

        Returns:
            the mean "cosine" with the start and the mean "norm_ratio", and "near", for each embedding its nearest
            words with their cosines. None between looks, and where what is read is still the same as before.
        """
        if self.start is None or (done % self.every and done != self.total):
            return None
        with _in_eval_mode(self.method):
            read = _read_attached(self.method, self.base)
        if torch.allclose(read, self.start, rtol=0, atol=TOLERANCE * float(self.start.abs().max())):
            return None
        return {
            "cosine": float(torch.cosine_similarity(read, self.start).mean()),
            "norm_ratio": float((read.norm(dim=1) / self.start.norm(dim=1)).mean()),
            "near": self._near(read),
        }

    @torch.no_grad()
    def _near(self, read: Tensor) -> list[list[tuple[str, float]]]:
        table = self.base.text_encoders.vocabulary
        if not self.words:
            self.words, ids = whole_words(self.base)
            self.ids, self.norms = torch.tensor(ids), table.float().norm(dim=1).cpu()[ids]
        rows = (read / read.norm(dim=1, keepdim=True)).to(table)
        alike = (table @ rows.T).float().cpu()[self.ids] / self.norms[:, None]  # (words, n)
        best = alike.topk(min(WORDS, len(self.words)), dim=0)
        return [
            [(self.words[place], round(value, 6)) for place, value in zip(*pair, strict=True)]
            for pair in zip(best.indices.T.tolist(), best.values.T.tolist(), strict=True)
        ]
