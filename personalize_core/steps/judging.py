"""Scores of a judge beside those of the encoders, where params.yaml asks one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from personalize_core.steps.events import Event, Listener
from personalize_core.workspace.recipes import device_of
from personalize_core.workspace.store import REFERENCES, Store

if TYPE_CHECKING:
    from personalize_core.metrics.judge.questions import Judge, Showing
    from personalize_core.metrics.scoring import Scored


def add_judged(
    store: Store,
    concept: str,
    method: str,
    found: Scored,
    concept_images: Sequence[Path],
    held_out: Sequence[Path] | None,
    listener: Listener,
) -> None:
    """Put the judge's rows beside those of the encoders. No device is kept while a server is waited for.

    Args:
        method: or REFERENCES, for the concept images themselves.
        found: what the encoders made of the same images.

    Raises:
        InputError: the judge cannot be asked, or answers no question.
    """
    from personalize_core.metrics.judge import judging
    from personalize_core.metrics.judge.kept_answers import KeptAnswers

    def told(done: int, total: int) -> None:
        listener(Event(f"asking the judge about {concept}, {method}", done, total))

    described = store.concept(concept)
    with ExitStack() as stack:
        if store.params.judge and store.params.judge.local:
            stack.enter_context(store.device())
        judge, showing = _loaded(store)
        asking = judging.Asking(judge, showing, KeptAnswers(store.judge_answers), told)
        if method == REFERENCES:
            judging.judge_concept_images(found, store.root, described, concept_images, asking, held_out)
        else:
            skipped = found.without_identity
            judging.judge_images(found, store.root, found.images, described, concept_images, asking, skipped, held_out)


def _loaded(store: Store) -> tuple[Judge, Showing]:
    """The judge of params.yaml, and how it is asked."""
    from personalize_core.metrics.judge.chat import ChatJudge
    from personalize_core.metrics.judge.questions import Showing

    if not (settings := store.params.judge):
        raise ValueError("params.yaml asks no judge")
    showing = Showing(
        settings.image_size,
        None if settings.local else settings.detail,
        settings.temperature,
        settings.repetitions,
        settings.concept_images,
    )
    if settings.local:
        from personalize_core.metrics.judge.local import load_local

        return load_local(settings.local.model, settings.local.revision, device_of(store)), showing
    return (
        ChatJudge(
            str(settings.address),
            str(settings.model),
            settings.key_variable,
            settings.detail,
            settings.temperature,
            settings.requests_at_once,
            settings.timeout,
        ),
        showing,
    )
