"""What a method's images depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from personalize_core.files.snapshot import memoized
from personalize_core.files.stamps import Stamp, sha256, sources_hash, stamp_of
from personalize_core.methods import method_source
from personalize_core.workspace.recipes import preprocessing_of, prompts_of, variants_of
from personalize_core.workspace.stamps.common import computed_by
from personalize_core.workspace.stamps.latents import latents_stamp
from personalize_core.workspace.stamps.made import artifact_stamp
from personalize_core.workspace.stamps.sources import GUIDING, REFINING, SAMPLING
from personalize_core.workspace.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from personalize_core.workspace.protocols import Prompts
    from personalize_core.workspace.variants import Variant


@dataclass(frozen=True)
class SamplingInputs:
    """What one image grid depends on: looked up once, then handed on."""

    prompts: Prompts
    variants: Mapping[str, Variant]
    artifact: str  # its stamp
    stamp: Stamp


def sampling_inputs(store: Store, concept: str, method: str) -> SamplingInputs:
    """What the method's images of the concept depend on.

    Raises:
        InputError: the method has not been trained on the concept, or not on this base model.
    """
    prompts, variants = prompts_of(store, concept), variants_of(store, method)
    artifact = artifact_stamp(store, concept, method)
    stamp = stamp_of(
        {
            "artifact": artifact,
            "templates": prompts.templates,
            **sampled_by(store, method),
            "sources": sampling_sources(method),
            **refined_by(store, concept, method, variants),
        }
    )
    return SamplingInputs(prompts, variants, artifact, stamp)


def sampling_stamp(store: Store, method: str) -> Stamp:
    """Names what the images of a method depend on besides its artifact: the same for all concepts."""
    lists = sorted(store.prompts(each.name) for each in store.params.sampling.prompts)
    refined, guided = refinements(variants_of(store, method)), guidances(variants_of(store, method))
    return stamp_of(
        {
            **sampled_by(store, method),
            "lists": [each.model_dump(exclude={"without_identity"}) for each in store.params.sampling.prompts],
            "prompts": {path.name: sha256(path) for path in lists if path.is_file()},
            "refinement": refined,
            **({"guidance": guided} if guided else {}),
            "sources": sampling_sources(method, *(REFINING if refined else ()), *(GUIDING if guided else ())),
        }
    )


@memoized
def sampled_by(store: Store, method: str) -> dict[str, Any]:
    """What a method's images depend on, besides artifact, prompts and sources, whatever they are of."""
    params = store.params
    return {
        "sampling": params.sampling.how(),
        "variants": {name: repr(variant.sampling) for name, variant in variants_of(store, method).items()},
        "precision": params.precision,
        "seed": store.sampling_seed,
        **computed_by(store),
    }


@memoized
def sampling_sources(method: str, *more: str) -> Stamp:
    return sources_hash([*SAMPLING, method_source(method), *more])


def refinements(variants: Mapping[str, Variant]) -> dict[str, str]:
    """Variant -> its test-time optimization, of those that ask for it."""
    return {name: repr(variant.refinement) for name, variant in variants.items() if variant.refinement}


def guidances(variants: Mapping[str, Variant]) -> dict[str, str]:
    """Variant -> its guidance with the base model's weights, of those that ask for it."""
    return {name: repr(variant.guidance) for name, variant in variants.items() if variant.guidance}


def refined_by(store: Store, concept: str, method: str, variants: Mapping[str, Variant]) -> dict[str, Any]:
    """What images depend on besides, where a variant asks for a strategy beside the method's own options."""
    found: dict[str, Any] = {}
    if refined := refinements(variants):
        latents = latents_stamp(store, concept, preprocessing_of(store, method))
        found |= {"refinement": refined, "latents": latents, "refining_sources": sources_hash(REFINING)}
    if guided := guidances(variants):
        found |= {"guidance": guided, "guiding_sources": sources_hash(GUIDING)}
    return found
