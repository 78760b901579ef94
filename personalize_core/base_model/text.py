"""Prompts as token ids, where the words stand among them, and what the cross-attention layers read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from personalize_core.base_model.transfer import moved
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError

PLACEHOLDER = "<placeholder>"  # the one token that every concept's placeholder becomes


@dataclass(frozen=True)
class Tokens:
    """Prompts as ids, and the places of their words; all (B, L)."""

    ids: Tensor  # long; a placeholder carries the rare token's id, so the model reads that token's embedding
    placeholder: Tensor  # bool: the concept's own token
    class_noun: Tensor  # bool: every token of the class noun
    words: Tensor  # bool: every token of the prompt, without begin, end and padding
    end: Tensor  # bool: the first end-of-text token, one per row
    second_ids: Tensor | None = None  # long: for a second text encoder, whose tokenizer pads otherwise

    def to(self, device: torch.device) -> Tokens:
        return Tokens(*moved(self._fields(), device))

    def rows(self) -> list[Tokens]:
        """Each prompt by itself, (L,)."""
        return [Tokens(*row) for row in zip(*self._fields(), strict=True)]

    @classmethod
    def of(cls, rows: Sequence[Tokens]) -> Tokens:
        """The opposite of `rows`."""
        return cls(*map(torch.stack, zip(*(row._fields() for row in rows), strict=True)))

    def _fields(self) -> list[Tensor]:
        every = [self.ids, self.placeholder, self.class_noun, self.words, self.end, self.second_ids]
        return [field for field in every if field is not None]


@dataclass(frozen=True)
class TextContext:
    """What the cross-attention layers read in one U-Net call, and what the U-Net is told beside it."""

    hidden: Tensor  # (B, L, D), what the text encoders say; what every layer reads, but for `layers`
    placeholder: Tensor  # (B, L) bool, as are the next three: see Tokens
    class_noun: Tensor
    words: Tensor
    end: Tensor
    partner: Tensor  # (B,) long: the row of the same image with its prompt; itself, but in guidance's empty half
    # (n, B, L, D) each: texts for keys and for values, one for each layer, or as `of_layer` says.
    layers: tuple[Tensor, Tensor] | None = None
    of_layer: tuple[int, ...] | None = None  # which of these texts each cross-attention layer reads
    several: Tensor | None = None  # (C, B, L) bool: the words of each concept, where a prompt speaks of several
    # In one timestep: the rows (R,) that read something different, and for each row (B,) which of them reads the same.
    distinct: tuple[Tensor, Tensor] | None = None
    pooled: Tensor | None = None  # (B, P): Stable Diffusion XL's, of the whole text
    # (B, 6): Stable Diffusion XL's, original height and width, top and left of the crop, target height and width, in
    # pixels; None: uncropped, of the base model's image size.
    sizes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The text that layer `index` (from 0, in the order they run) takes keys from, and values from."""
        if self.layers is None:
            return self.hidden, self.hidden
        (keys, values), text = self._by_layer, self.of_layer[index] if self.of_layer else index
        return keys[text], values[text]

    @cached_property
    def _by_layer(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Taken apart once: the gradient of an index would be as large as the text of all layers, for each of them."""
        assert self.layers is not None
        keys, values = self.layers
        apart = keys.unbind()
        return apart, apart if values is keys else values.unbind()

    @property
    def concept(self) -> Tensor:
        """(B, L) bool: every token that speaks of the concept, placeholder and class noun."""
        return self.placeholder | self.class_noun

    @property
    def concepts(self) -> Tensor:
        """(C, B, L) bool: the words of each concept that the prompts speak of; C is 1 but for `several`."""
        return self.concept[None] if self.several is None else self.several

    @property
    def unconditional(self) -> Tensor:
        """(B,) bool: the rows that are the prompt-free half of classifier-free guidance."""
        return self.partner != torch.arange(len(self), device=self.partner.device)

    def and_again(self) -> TextContext:
        """All rows, and behind them the distinct ones again, or all if these are not known; partners are there too."""
        rows, places = self.distinct or (None, None)
        partner = self.partner if rows is None or places is None else places[self.partner[rows]]

        def again(tensor: Tensor, dim: int = 0) -> Tensor:
            return torch.cat([tensor, tensor if rows is None else tensor.index_select(dim, rows)], dim)

        return TextContext(
            hidden=again(self.hidden),
            placeholder=again(self.placeholder),
            class_noun=again(self.class_noun),
            words=again(self.words),
            end=again(self.end),
            partner=torch.cat([self.partner, partner + len(self)]),
            layers=(again(self.layers[0], 1), again(self.layers[1], 1)) if self.layers else None,
            of_layer=self.of_layer,
            several=None if self.several is None else again(self.several, 1),
            distinct=self.distinct,
            pooled=None if self.pooled is None else again(self.pooled),
            sizes=None if self.sizes is None else again(self.sizes),
        )

    def part(self, rows: slice) -> TextContext:
        """Some of the rows, of prompts that are their own partners, as in training."""
        start, stop, _ = rows.indices(len(self))
        if (start, stop) == (0, len(self)):
            return self
        return TextContext(
            hidden=self.hidden[rows],
            placeholder=self.placeholder[rows],
            class_noun=self.class_noun[rows],
            words=self.words[rows],
            end=self.end[rows],
            partner=self.partner[rows] - start,
            layers=(self.layers[0][:, rows], self.layers[1][:, rows]) if self.layers else None,
            of_layer=self.of_layer,
            several=None if self.several is None else self.several[:, rows],
            pooled=None if self.pooled is None else self.pooled[rows],
            sizes=None if self.sizes is None else self.sizes[rows],
        )

    def cut_off(self) -> tuple[TextContext, list[tuple[Tensor, Tensor]]]:
        """The same text with a graph of its own, and (tensor, its copy) of what carried a gradient.

        The gradient that several passes leave in the copies goes on into the tensors in one backward pass.
        """
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def own(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            if id(tensor) not in copies:  # keys and values are often one tensor
                copies[id(tensor)] = tensor, tensor.detach().requires_grad_()
            return copies[id(tensor)][1]

        layers = (own(self.layers[0]), own(self.layers[1])) if self.layers else None
        pooled = None if self.pooled is None else own(self.pooled)
        return replace(self, hidden=own(self.hidden), layers=layers, pooled=pooled), list(copies.values())

    @classmethod
    def guidance(
        cls, empty: TextContext, prompt: TextContext, distinct: tuple[Tensor, Tensor] | None = None
    ) -> TextContext:
        """Both halves of classifier-free guidance, the empty prompts first; row i goes with row B + i.

        Args:
            distinct: of both halves, from `distinct_rows`.
        """
        rows = len(prompt)
        return cls(
            hidden=torch.cat([empty.hidden, prompt.hidden]),
            placeholder=torch.cat([empty.placeholder, prompt.placeholder]),
            class_noun=torch.cat([empty.class_noun, prompt.class_noun]),
            words=torch.cat([empty.words, prompt.words]),
            end=torch.cat([empty.end, prompt.end]),
            partner=torch.arange(rows, 2 * rows, device=prompt.partner.device).repeat(2),
            layers=_both_halves(empty, prompt),
            of_layer=empty.of_layer or prompt.of_layer,
            several=None if prompt.several is None else torch.cat([empty.concepts, prompt.concepts], dim=1),
            distinct=distinct,
            pooled=_both(empty.pooled, prompt.pooled),
            sizes=_both(empty.sizes, prompt.sizes),
        )


def _both(empty: Tensor | None, prompt: Tensor | None) -> Tensor | None:
    return None if empty is None or prompt is None else torch.cat([empty, prompt])


def distinct_rows(prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """`TextContext.distinct`: the rows whose prompt is the first of its kind, and for each row its equal among them."""
    first = {prompt: prompts.index(prompt) for prompt in prompts}
    place = {prompt: number for number, prompt in enumerate(first)}
    rows, places = list(first.values()), [place[prompt] for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(places, device=device)


def _both_halves(empty: TextContext, prompt: TextContext) -> tuple[Tensor, Tensor] | None:
    """`layers` of guidance's two halves; where only one half has texts per layer, the other's is repeated for all."""
    given = [context.layers for context in (empty, prompt) if context.layers]
    if not given:
        return None
    count = len(given[0][0])
    halves = [
        context.layers or (context.hidden.expand(count, *context.hidden.shape),) * 2 for context in (empty, prompt)
    ]
    return torch.cat([keys for keys, _ in halves], dim=1), torch.cat([values for _, values in halves], dim=1)


Conditioning = Callable[[Tensor], TextContext]
"""Timesteps (B,) -> what the cross-attention layers read at them. Constant for all methods but NeTI."""


class PromptTokenizer:
    """A base model's tokenizer, with one more token for the concept's placeholder.

    Positions are found by token id, never by counting characters: class nouns may have several tokens,
    and the families of Stable Diffusion pad differently.

    Args:
        second: of a second text encoder; it differs from the first in how it pads.
    """

    def __init__(self, tokenizer: CLIPTokenizer, rare_word: str, second: CLIPTokenizer | None = None) -> None:
        if second is not None and second.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                "the base model's two tokenizers have different vocabularies, so that a word stands at different "
                "places for its two text encoders; take a Stable Diffusion XL with CLIP's two tokenizers"
            )
        self._second: Any = second
        rare = tokenizer(rare_word, add_special_tokens=False).input_ids
        if len(rare) != 1:
            raise InputError(
                f"{rare_word!r} is {len(rare)} tokens for this base model; the rare word that stands for a concept "
                "must be one token, or it binds weakly"
            )
        for each in filter(None, (tokenizer, second)):
            each.add_tokens([PLACEHOLDER])
        self._tokenizer: Any = tokenizer
        self._placeholder_id: int = self._tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        self.rare_word, self.rare_id = rare_word, rare[0]
        self.length: int = tokenizer.model_max_length
        self._end: int = self._tokenizer.eos_token_id

    def __call__(self, prompts: Sequence[str], concept: Concept | None = None) -> Tokens:
        """Tokenize, pad and locate. Without a concept no token is the placeholder or the class noun.

        Raises:
            InputError: a prompt is too long, so that words would be cut off.
        """
        texts = [prompt.replace(concept.placeholder, PLACEHOLDER) if concept else prompt for prompt in prompts]
        rows = self._tokenizer(texts, padding="max_length", max_length=self.length).input_ids
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.length:
                raise InputError(
                    f"the prompt has {len(row) - 2} tokens, the base model reads {self.length - 2}; "
                    f"shorten it: {prompt!r}"
                )
        ids = torch.tensor(rows)
        placeholder = ids == self._placeholder_id
        is_end = ids == self._end
        position = torch.arange(self.length)
        first_end = is_end.int().argmax(dim=1, keepdim=True)
        return Tokens(
            ids=ids.masked_fill(placeholder, self.rare_id),
            placeholder=placeholder,
            class_noun=self._class_noun(ids, placeholder, concept),
            words=(position > 0) & (position < first_end),
            end=position == first_end,
            second_ids=self._ids_of_second(texts),
        )

    def spelled(self, prompt: str, concept: Concept) -> list[tuple[str, list[int]]]:
        """The prompt's words in order, each with the positions of its tokens; the placeholder is a word."""
        tokens = self([prompt], concept)
        words: list[tuple[str, list[int]]] = []
        begun = False  # a word whose last token has not come yet
        for position in tokens.words[0].nonzero().flatten().tolist():
            spelling = self._tokenizer.convert_ids_to_tokens(int(tokens.ids[0, position]))
            if tokens.placeholder[0, position]:
                spelling, begun = f"{concept.placeholder}</w>", False
            word, positions = words.pop() if begun else ("", [])
            words.append((word + spelling.removesuffix("</w>"), [*positions, position]))
            begun = not spelling.endswith("</w>")
        return words

    def entry_id(self, entry: str) -> int | None:
        """The id of an entry of the vocabulary, as it is spelled there: "ktn" begins words, "ktn</w>" would be one."""
        return self._tokenizer.get_vocab().get(entry)

    def class_noun_ids(self, class_noun: str) -> list[int]:
        return self._tokenizer(class_noun, add_special_tokens=False).input_ids

    def check_class_noun(self, concept: Concept) -> None:
        """Raise unless the class noun keeps its tokens behind the placeholder, where methods look for it."""
        ids = self.class_noun_ids(concept.class_noun)
        tokens = self([f"a photo of a {concept.placeholder} {concept.class_noun}"], concept)
        unknown = self._tokenizer.unk_token_id  # CLIP's is the end-of-text token, which no word has
        if not ids or unknown in ids or int(tokens.class_noun.sum()) != len(ids):
            raise InputError(
                f"concept {concept.name!r}: this base model's tokenizer cannot place the class noun "
                f"{concept.class_noun!r} in a prompt; choose another word for the same kind of thing"
            )

    def _ids_of_second(self, texts: list[str]) -> Tensor | None:
        if self._second is None:
            return None
        ids = torch.tensor(self._second(texts, padding="max_length", max_length=self.length).input_ids)
        return ids.masked_fill(ids == self._placeholder_id, self.rare_id)

    def _class_noun(self, ids: Tensor, placeholder: Tensor, concept: Concept | None) -> Tensor:
        """(B, L) bool: the noun right behind the placeholder, or wherever it stands in a prompt without one."""
        found = torch.zeros_like(placeholder)
        noun = torch.tensor(self.class_noun_ids(concept.class_noun)) if concept else torch.tensor([])
        if len(noun) == 0:
            return found
        starts = (ids.unfold(1, len(noun), 1) == noun).all(dim=-1)  # (B, L - q + 1)
        behind = torch.zeros_like(starts)
        behind[:, 1:] = placeholder[:, : starts.shape[1] - 1]
        starts &= behind | ~placeholder.any(dim=1, keepdim=True)
        for offset in range(len(noun)):
            found[:, offset : offset + starts.shape[1]] |= starts
        return found
