"""Training batches that several methods share: under prompt templates, and with prior preservation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator

from personalize_core.concepts.concept import SLOT
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Batch, Method


def with_prior(
    method: Method, template: str, images: ConceptLatents, size: int, generator: Generator, prior_weight: float | None
) -> Batch:
    """`size` images of the concept, then as many of its class noun (prior preservation, eq. 2 of DreamBooth).

    The two means of the loss are taken separately, each over its own rows; the second counts `prior_weight`.
    Without a weight there are no rows of the class noun.
    """
    batch = Batch.of(images.instance_rows(size, generator), [method.say(template)] * size)
    if prior_weight is None:
        return batch
    prior, said = images.prior_rows(size, generator), template.replace(SLOT, method.concept.class_noun)
    return batch.followed_by(Batch.of(prior, [said] * size, prior_weight))


def from_templates(
    method: Method, templates: Sequence[str], images: ConceptLatents, size: int, generator: Generator
) -> Batch:
    """`size` images of the concept, each under a template drawn uniformly."""
    chosen = torch.randint(len(templates), (size,), generator=generator).tolist()
    prompts = [method.say(templates[int(index)]) for index in chosen]
    return Batch.of(images.instance_rows(size, generator), prompts)
