"""Context regularization: a new concept is well embedded if the words around it still mean what they meant.

Wu et al., "CoRe: Context-Regularized Text Embedding Learning for Text-to-Image Personalization", AAAI 2025,
arXiv:2408.15914. Equation numbers below are that paper's (version 1). The losses compare a prompt that names the
concept with the same prompt that names its class, token by token, and need no image of either. CoRe trains with
them; `ContextRefined` refines any learned embedding with them for one prompt ("test-time optimization").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from personalize_core.base_model.attention import AttentionMaps, by_transformer
from personalize_core.base_model.layers import Pool
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import Conditioning
from personalize_core.concepts.concept import SLOT, Concept
from personalize_core.errors import InputError
from personalize_core.methods.shared.options import Axis, ContextLosses, Reduction

Progress = Callable[[int, int, float], None]
"""(steps done, steps, the loss before the last of them) -> None"""


@dataclass(frozen=True)
class PromptPair:
    """One template, filled with the concept and with its class noun, and the context tokens that the two share.

    The context is everything from the begin token up to and including the first end token, but for the concept
    itself. Where V takes k tokens and the class noun q, position p behind the concept goes with p - k + q.
    """

    concept_prompt: str
    class_prompt: str
    concept_positions: Tensor  # (m,) long: the context tokens of the first prompt
    class_positions: Tensor  # (m,) long: those of the second, in the same order

    @classmethod
    def of(cls, base: BaseModel, concept: Concept, template: str, phrase: str) -> PromptPair:
        """phrase: what stands in the template's slot for the concept; it begins with the placeholder.

        Raises:
            InputError: the prompt names the concept more than once, or the tokenizer reads its context differently
                beside the placeholder and beside the class noun.
        """
        prompts = [template.replace(SLOT, phrase), template.replace(SLOT, concept.class_noun)]
        tokens = base.tokenizer(prompts, concept)
        spoken = tokens.placeholder[0].nonzero().flatten().tolist()
        if len(spoken) != 1:
            raise InputError(
                f"context regularization compares the words around the concept, so a prompt must name it once, "
                f"not {len(spoken)} times: {prompts[0]!r}"
            )
        k, q = (int(base.tokenizer([said], concept).words.sum()) for said in (phrase, concept.class_noun))
        (start,), end = spoken, int(tokens.end[0].int().argmax())
        concept_positions = torch.tensor([p for p in range(end + 1) if not start <= p < start + k])
        class_positions = torch.where(concept_positions < start, concept_positions, concept_positions - k + q)
        context, class_context = tokens.ids[0][concept_positions], tokens.ids[1][class_positions]
        if int(tokens.end[1].int().argmax()) != end - k + q or not torch.equal(context, class_context):
            raise InputError(
                f"the words around the concept are not the same tokens in {prompts[0]!r} and {prompts[1]!r}; "
                "write the concept as a word of its own"
            )
        return cls(
            concept_prompt=prompts[0],
            class_prompt=prompts[1],
            concept_positions=concept_positions.to(base.device),
            class_positions=class_positions.to(base.device),
        )

    def of_the_concept(self) -> PromptPair:
        """The same prompts, with the placeholder beside the last token of the class noun in place of the context."""

        def left_out(positions: Tensor) -> list[int]:
            return sorted(set(range(int(positions.max()) + 1)) - set(positions.tolist()))

        placeholder, noun = left_out(self.concept_positions)[:1], left_out(self.class_positions)[-1:]
        like = self.concept_positions
        return replace(self, concept_positions=like.new_tensor(placeholder), class_positions=like.new_tensor(noun))


def context_embedding_loss(concept_context: Tensor, class_context: Tensor, axis: Axis) -> Tensor:
    """How far the text encoder's outputs for the context tokens are from the class prompt's; in [0, 2].

    Args:
        concept_context: (m, D), of the prompt that names the concept.
        class_context: (m, D), of the prompt that names the class; no gradient flows into it.
        axis: "feature" is eq. 3: one minus the mean over the tokens of the cosine of their D features. "token" is
            the released code: one minus the mean over the features of the cosine of their values at the m tokens. There
            also tokens before the concept count, which a causal text encoder makes alike in both prompts; in "feature"
            each of them contributes 0.
    """
    over = {"token": 0, "feature": 1}[axis]
    return 1 - F.cosine_similarity(concept_context.float(), class_context.detach().float(), dim=over).mean()


def context_embedding_loss_of_encoders(
    concept_context: Tensor, class_context: Tensor, axis: Axis, widths: Sequence[int]
) -> Tensor:
    """The mean of `context_embedding_loss` over the text encoders, whose outputs stand side by side.

    Args:
        widths: of each encoder's output; they add up to D.
    """
    parts = zip(concept_context.split(list(widths), dim=-1), class_context.split(list(widths), dim=-1), strict=True)
    losses = [context_embedding_loss(*part, axis) for part in parts]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def context_attention_loss(
    maps: AttentionMaps,
    class_maps: AttentionMaps,
    layers: Sequence[str],
    pair: PromptPair,
    pool: Pool,
    reduction: Reduction,
    share: float = 1.0,
) -> Tensor:
    """How far the mean attention to each context token is from the class prompt's.

    Eq. 4 is the mean over the context tokens of the squared difference of the two mean attentions, each over all
    values of all layers' maps (`pool` "all"). The released code takes the means layer by layer and averages the squares
    over the layers ("layer"), and sums over the batch of which the paper does not speak. Every transformer counts as
    much, however many layers it has, which is ours.

    Args:
        maps: of the prompt that names the concept; the gradient reaches its keys and queries.
        class_maps: of the same noisy latents under the prompt that names the class, recorded without gradient.
        layers: whose maps to compare.
        share: how many rows of the batch these are; the losses of a batch's parts then add up to its own.
    """
    mean = maps.means(layers, pool)[..., pair.concept_positions]  # (layers, B, m), or (1, B, m)
    with torch.no_grad():
        class_mean = class_maps.means(layers, pool)[..., pair.class_positions]
    squares = (mean - class_mean).pow(2).mean(dim=-1)  # (layers, B), or (1, B)
    of_rows = (squares if len(squares) == 1 else by_transformer(squares, layers)).mean(dim=0)  # (B,)
    return of_rows.sum() if reduction == "sum" else share * of_rows.mean()


def context_losses(
    how: ContextLosses,
    base: BaseModel,
    concept: Concept,
    pair: PromptPair,
    condition: Conditioning,
    x_t: Tensor,
    t: Tensor,
    share: float = 1.0,
    sizes: Tensor | None = None,
) -> dict[str, Tensor]:
    """Both losses by name, times their weights; one of weight 0 is left out, and costs nothing.

    Args:
        condition: of the pair's concept prompt, B times; carries the gradient.
        x_t: (B, 4, h, w) noisy latents, under which both prompts' attention is compared.
        t: (B,) their timesteps.
        share: see context_attention_loss.
        sizes: (B, 6), see `TextContext`.
    """
    said, losses = replace(condition(t), sizes=sizes), {}
    with torch.no_grad():
        class_said = replace(base.encode([pair.class_prompt] * len(x_t), concept), sizes=sizes)
    if how.cer_weight:  # the rows are one prompt, so the first stands for all
        context = said.hidden[0, pair.concept_positions]
        class_context = class_said.hidden[0, pair.class_positions]
        loss = context_embedding_loss_of_encoders(context, class_context, how.cer_axis, base.text_encoders.widths)
        losses["context_embedding"] = how.cer_weight * share * loss
    if how.car_weight:
        maps, class_maps = AttentionMaps(), AttentionMaps()
        base.denoise(x_t, t, said, maps)
        with torch.no_grad():
            base.denoise(x_t, t, class_said, class_maps)
        loss = context_attention_loss(maps, class_maps, base.layers, pair, how.car_pool, how.car_batch, share)
        losses["context_attention"] = how.car_weight * loss
    return losses
