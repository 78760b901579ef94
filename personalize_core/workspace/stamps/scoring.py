"""What a table of scores depends on, and the list of an external column's images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from personalize_core.concepts import concept_files
from personalize_core.errors import InputError
from personalize_core.files.atomic import is_up_to_date
from personalize_core.files.snapshot import memoized
from personalize_core.files.stamps import Stamp, sources_hash, stamp_of
from personalize_core.metrics.encoder_names import weights_of
from personalize_core.metrics.judge import local_weights
from personalize_core.sampling.grid import read_grid
from personalize_core.workspace.recipes import prompts_of, split_of
from personalize_core.workspace.stamps.common import held_out
from personalize_core.workspace.stamps.made import grid_stamp
from personalize_core.workspace.stamps.sources import EXTERNAL, JUDGING, SCORING
from personalize_core.workspace.store import REFERENCES, Store, is_label

if TYPE_CHECKING:
    from collections.abc import Mapping


def score_stamp(store: Store, concept: str, method: str) -> Stamp:
    """Names everything that a table of scores depends on; method may be REFERENCES.

    Raises:
        InputError: there is no grid of the method.
    """
    from personalize_core.concepts.masks import own_content

    sampled: dict[str, Any] = {}
    if method != REFERENCES:
        sampled["grid"] = grid_stamp(store, concept, method)
        sampled["without_identity"] = without_identity(store, concept, method)
    folder = store.concept_folder(concept)
    return stamp_of(
        {
            **sampled,
            **scored_by(store),
            "concept": vars(store.concept(concept)),
            "concept_images": concept_files.content(folder),
            "masks": own_content(folder) if store.params.encoders.segmenter else {},
            **({"held_out": list(split_of(store, concept).held_out)} if store.params.held_out else {}),
        }
    )


def scoring_stamp(store: Store) -> Stamp:
    """Names what scores depend on besides sampled and concept images."""
    unread = [each.without_identity for each in store.params.sampling.prompts]
    return stamp_of({**scored_by(store), "without_identity": unread, **held_out(store)})


def is_scored_as_now(store: Store, concept: str, method: str) -> bool:
    """Would scoring leave this table as it is? method: or the label of an external column."""
    try:
        return is_up_to_date(store.scores(method, concept), score_stamp(store, concept, method))
    except InputError:  # nothing has been sampled
        return False


def without_identity(store: Store, concept: str, method: str) -> list[int]:
    """Places of prompts in the grid's list whose images have no identity scores, as the protocol has it.

    An external column has a list of its own, in which they are found by their text.
    """
    prompts = prompts_of(store, concept)
    if not is_label(method):
        return sorted(prompts.without_identity)
    skipped = {prompts.templates[place] for place in prompts.without_identity}
    templates = read_grid(store.grid(method, concept))["templates"]
    return [place for place, template in enumerate(templates) if template in skipped]


@memoized
def scored_by(store: Store) -> dict[str, Any]:
    """What every table of scores depends on, whatever it is of."""
    names = store.params.encoders
    by_name = [*names.text_image, *names.identity, *filter(None, [names.segmenter, names.masc])]
    return {
        "encoders": [weights_of(name) for name in by_name],
        "lists": names.model_dump(),
        "sources": sources_hash(SCORING),
        **_judged_by(store),
    }


def _judged_by(store: Store) -> dict[str, Any]:
    """Nothing where no judge is asked, so that tables without one keep their stamp."""
    if not (judge := store.params.judge):
        return {}
    weights = local_weights.weights_of(judge.local.model, judge.local.revision) if judge.local else ""
    return {"judge": {**judge.scored_by, "weights": weights, "sources": sources_hash(JUDGING)}}


def external_stamp(store: Store, concept: str, label: str, listed: Mapping[str, Any]) -> Stamp:
    """Names everything that the list of an external column's images depends on.

    listed: what the list holds, with the sha256 of every image.
    """
    return stamp_of({"listed": listed, "concept": vars(store.concept(concept)), "sources": sources_hash(EXTERNAL)})
