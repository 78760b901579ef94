"""Prompts as the cross-attention layers read them: tokens, learned embeddings in the placeholder's place, encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.kept_prompts import MOST_PROMPTS, KeptPrompts, Recent
from personalize_core.base_model.prompt_variants import PromptVariants, part_of
from personalize_core.base_model.text import PromptTokenizer, TextContext, Tokens
from personalize_core.base_model.text_encoders import Said, TextEncoders
from personalize_core.concepts.concept import Concept


class PromptReader:
    """A base model's tokenizer and text encoders, which read each prompt as seldom as they can."""

    def __init__(
        self, tokenizer: PromptTokenizer, encoders: TextEncoders, device: torch.device, empty_prompt_is_zero: bool
    ) -> None:
        """
        Args:
            device: of the encoders.
            empty_prompt_is_zero: whether an empty prompt is read as zeros.
        """
        self.tokenizer, self.encoders, self.device = tokenizer, encoders, device
        self.recomputes = False  # whether the encoders keep little for the gradient, and are computed again for it
        self.kept: KeptPrompts[Said] = KeptPrompts(encoders)
        self._tokens: Recent[tuple[Tokens, bool]] = Recent(MOST_PROMPTS)
        self._zeros_for_empty = empty_prompt_is_zero

    def encode(
        self, prompts: Sequence[str], concept: Concept | None = None, embedding: Tensor | None = None
    ) -> TextContext:
        """The prompts as the cross-attention layers read them.

        Args:
            prompts: B of them, with the concept's placeholder where the concept belongs.
            concept: whose placeholder and class noun to look for.
            embedding: (D,), or (B, 1, D) for each row its own, read in the placeholder's place; the rare token's
                own embedding if None.

        A prompt whose text no gradient flows into is read once, by itself, and kept (`KeptPrompts`): what it reads as
        then depends on no other prompt, so that a run that is cut off and resumed reads the same bits. Of the others,
        equal ones are read once.
        """
        rows = self._kept_rows(prompts, concept)
        tokens = Tokens.of([row for row, _ in rows])
        if self.kept.hooked or (embedding is not None and embedding.ndim > 1):
            said = self._read(tokens, embedding)
        else:
            said = self._read_each_once(prompts, rows, concept, embedding)
        if self._zeros_for_empty and not all(prompts):
            pairs = zip(prompts, said.rows(), strict=True)
            said = Said.of([row if prompt else row.nothing() for prompt, row in pairs])
        return TextContext(
            hidden=said.hidden,
            placeholder=tokens.placeholder,
            class_noun=tokens.class_noun,
            words=tokens.words,
            end=tokens.end,
            partner=torch.arange(len(prompts), device=self.device),
            pooled=said.pooled,
        )

    def encode_variants(self, prompts: Sequence[str], concept: Concept, embeddings: Tensor) -> PromptVariants:
        """The same prompts with many embeddings in the placeholder's place, in one pass of the text encoders.

        What the variants share is read once; but where a hook looks into an encoder, or changes it, all of each.

        Args:
            prompts: B of them, of which at least one names the concept.
            concept: whose placeholder to look for.
            embeddings: (V, B, D), or (V, 1, D) for all prompts the same: what each variant reads there.
        """
        tokens = self.tokenizer(prompts, concept)
        if self.kept.hooked:
            return self._read_variants(tokens.to(self.device), embeddings.expand(-1, len(prompts), -1))
        places = tokens.placeholder.nonzero().T  # (2, K)
        first, (rows, positions) = int(places[1].min()), places.to(self.device)
        tokens, own = tokens.to(self.device), embeddings.expand(-1, len(prompts), -1)[:, rows]
        if self.recomputes and torch.is_grad_enabled():
            hidden = checkpoint(self.encoders.variants, tokens, rows, positions, first, own, use_reentrant=False)
        else:
            hidden = self.encoders.variants(tokens, rows, positions, first, own)
        return PromptVariants(hidden, rows, positions)

    @property
    def final_norm(self) -> nn.Module:
        """What the cross-attention layers read text through: the text encoder's last layer norm; of two, nothing."""
        encoder, *second = self.encoders.values()
        return nn.Identity() if second else part_of(encoder, "final_layer_norm")

    def forget(self) -> None:
        """Give back what was kept of prompts."""
        self.kept.clear()
        self._tokens.clear()

    def _kept_rows(self, prompts: Sequence[str], concept: Concept | None) -> list[tuple[Tokens, bool]]:
        """Each prompt's tokens, (L,) on the device, and whether the placeholder is among them."""
        found = {prompt: self._tokens.get((prompt, concept)) for prompt in prompts}
        if missing := [prompt for prompt, row in found.items() if row is None]:
            tokens = self.tokenizer(missing, concept)
            placed = tokens.placeholder.any(dim=1).tolist()
            for prompt, row, has in zip(missing, tokens.to(self.device).rows(), placed, strict=True):
                found[prompt] = self._tokens.keep((prompt, concept), (row, has))
        return [row for prompt in prompts if (row := found[prompt]) is not None]

    def _read_each_once(
        self,
        prompts: Sequence[str],
        rows: Sequence[tuple[Tokens, bool]],
        concept: Concept | None,
        embedding: Tensor | None,
    ) -> Said:
        """embedding: (D,)."""
        kept, read, learning = self.kept, dict[str, Said](), dict[str, Tokens]()
        trained, flows = kept.trained, embedding is not None and embedding.requires_grad and torch.is_grad_enabled()
        for prompt, (row, has_placeholder) in zip(prompts, rows, strict=True):
            own = embedding if has_placeholder else None
            if trained or (flows and has_placeholder):
                learning[prompt] = row
            elif prompt not in read:
                known = kept.get((prompt, concept), own)
                if known is None:
                    with torch.no_grad():
                        (said,) = self._read(Tokens.of([row]), own).rows()
                    known = kept.keep((prompt, concept), own, said)
                read[prompt] = known
        if learning:
            said = self._read(Tokens.of(list(learning.values())), embedding)
            read |= zip(learning, said.rows(), strict=True)
        return Said.of([read[prompt] for prompt in prompts])

    def _read(self, tokens: Tokens, embedding: Tensor | None) -> Said:
        """By one pass of the text encoders."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.encoders, tokens, embedding, use_reentrant=False)  # type: ignore[return-value]
        return self.encoders(tokens, embedding)

    def _read_variants(self, tokens: Tokens, embeddings: Tensor) -> PromptVariants:
        """embeddings: (V, B, D)."""
        variants, each, before = len(embeddings), embeddings.flatten(0, 1)[:, None], list[Tensor]()
        repeated = Tokens.of(tokens.rows() * variants)
        look = self.final_norm.register_forward_pre_hook(lambda norm, given: before.append(given[0]))
        with hooked(look):
            said = self.encoders(repeated, each)
        hidden = said.hidden if len(self.encoders) > 1 else before[0]  # two are read before their final norms
        rows, positions = tokens.placeholder.nonzero().T
        return PromptVariants(hidden.unflatten(0, (variants, -1)), rows, positions)
