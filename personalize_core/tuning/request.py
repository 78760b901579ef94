"""What a search is asked for: a method, a budget, concepts to tune on and others to report on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from personalize_core.errors import InputError, listed
from personalize_core.methods import is_trained, method_of
from personalize_core.workspace.recipes import check_concepts_wanted, concepts_wanted
from personalize_core.workspace.store import Store

REPEATS = 1


@dataclass(frozen=True)
class Request:
    """What a search is asked for."""

    method: str  # or METHOD@ABLATION
    minutes: float  # measured training, sampling and scoring on the tuning concepts
    on: tuple[str, ...]  # concepts to tune on
    report_on: tuple[str, ...]  # concepts held back until the search has ended
    variant: str  # of the method's sampling variants
    repeats: int = REPEATS  # further trainings of today's recipe and of the best, each with another seed


def request(
    store: Store,
    method: str,
    minutes: float,
    on: Sequence[str] = (),
    report_on: Sequence[str] = (),
    variant: str | None = None,
    repeats: int = REPEATS,
) -> Request:
    """The same with defaults for what was left out: the first half of the concepts by name, and the others.

    Raises:
        InputError: the method learns nothing, the budget is no time, there are too few concepts, or one is in both
            sets.
    """
    store.params.check_method(method)
    if not is_trained(method_of(method)):
        raise InputError(f"{method} learns nothing, so there is no recipe to tune; name another method")
    if not (math.isfinite(minutes) and minutes > 0):
        raise InputError(f"--minutes {minutes:g}: a budget is a number of minutes above 0")
    variants = list(store.params.own_variants(method))
    if variant is not None and variant not in variants:
        raise InputError(f"{method} has no sampling variant {variant!r} in params.yaml; it has {listed(variants)}")
    check_concepts_wanted(store)
    every = sorted(concepts_wanted(store))
    if twice := sorted(set(on) & set(report_on)):
        raise InputError(f"{listed(twice)} cannot be both tuned on and reported on; take it out of one of the two")
    for name in (*on, *report_on):
        store.concept(name)
    others = [name for name in every if name not in {*on, *report_on}]
    if not on and not report_on:
        half = (len(every) + 1) // 2
        on, report_on = every[:half], every[half:]
    elif not on:
        on = others
    elif not report_on:
        report_on = others
    if not on or not report_on:
        raise InputError(
            f"a search tunes on some concepts and reports on others, so it needs two at least, and there is only "
            f"{listed([*on, *report_on])}; add another with `personalize add FOLDER --class-noun NOUN`, or name "
            "both sets with --on and --report-on"
        )
    once = tuple(dict.fromkeys(on)), tuple(dict.fromkeys(report_on))
    return Request(method, minutes, *once, variant or variants[0], repeats)
