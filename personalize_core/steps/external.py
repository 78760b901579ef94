"""Images made elsewhere to a column of the comparison: listed, their prompts recognised, and scored as ours are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from personalize_core.concepts.concept import Concept, check_read_as_words
from personalize_core.errors import InputError, shown
from personalize_core.external.listing import ExternalImage, Listing
from personalize_core.external.mentions import Mentions
from personalize_core.files.atomic import is_up_to_date, write_json
from personalize_core.files.stamps import sha256
from personalize_core.sampling.grid import DESCRIPTION
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.steps.scores import left_out, score
from personalize_core.workspace.external_columns import ExternalColumn, check_label, read_column, register
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.stamps.common import base_model_name
from personalize_core.workspace.stamps.scoring import external_stamp
from personalize_core.workspace.store import ABSENT, Store

UNKNOWN = "not known"  # what made the images, where neither the user nor the layout says it
MOST_HASHED = 256  # images between two events
MOST_LEFT_OUT = 6  # images that are named with their reasons
SHOWN = (8, 4)  # prompts, and images of each, on the contact sheet


def add_external(store: Store, label: str, concept: str, column: ExternalColumn) -> ExternalColumn:
    """Check a folder of images and keep its description as an external column.

    Raises:
        InputError: the label or the concept cannot be used, the folder is not as its layout wants it, or no prompt
            mentions the concept. Nothing has been written then.
    """
    check_label(store, label)
    _templates(column.listing(store), store.concept(concept), column.mention)
    register(store, label, concept, column)
    return column


def score_external(store: Store, concept: str, label: str, listener: Listener = unheard) -> Report:
    """List the images of an external column, and score them.

    The report shows a sheet of the first images, and names those that have no score: they cannot be read, nothing says
    their prompt, or it does not mention the concept.
    """
    sheet = list_external(store, concept, label, listener).images
    report = score(store, concept, label, listener)
    lines = [f"left out: {words}" for words in left_out(store, concept, label)]
    if (more := len(lines) - MOST_LEFT_OUT) > 0:
        lines[MOST_LEFT_OUT:] = [f"left out: {more:,} more, which {report.path.with_name(ABSENT)} names"]
    return replace(report, images=sheet, notices=lines)


def list_external(store: Store, concept: str, label: str, listener: Listener = unheard) -> Report:
    """The images of an external column in the places of a grid: which prompt, which of its images, which seed.

    No image is copied. Those whose prompt does not mention the concept are left out, with that reason.

    Raises:
        InputError: there is no such column, or its folder is not as its layout wants it.
    """
    started, column, described = time.monotonic(), read_column(store, label, concept), store.concept(concept)
    listing = listing_of(store, label, concept)
    templates = _templates(listing, described, column.mention)
    kept = [image for image in listing.images if templates[image.prompt] is not None]
    hashes = _hashes(column.path(store), kept, f"reading {label} of {concept}", listener)
    unmentioned = [
        (image.file.as_posix(), f"its prompt does not mention the concept: {shown(image.prompt)}")
        for image in listing.images
        if templates[image.prompt] is None
    ]
    distinct = list(dict.fromkeys(str(templates[image.prompt]) for image in kept))
    images = _places(kept, hashes, {template: place for place, template in enumerate(distinct)}, templates)
    listed = {
        "concept": concept,
        "class_noun": described.class_noun,
        "method": label,
        "base_model": base_model_name(store),
        "variants": [label],
        "templates": distinct,
        "images_per_prompt": max(image["image"] for image in images) + 1,
        "external": {
            "folder": _folder(store, column),
            "layout": listing.layout,
            "source": column.source or listing.base_model or UNKNOWN,
        },
        "images": images,
        "left_out": [list(one) for one in (*listing.left_out, *unmentioned)],
        "protocol": store.protocol,
    }
    stamp, folder = external_stamp(store, concept, label, listed), store.grid(label, concept)
    with store.alone("grid", label, concept):
        skipped = is_up_to_date(folder, stamp)
        if not skipped:
            from personalize_core.report import comparison

            with making(store, folder, stamp) as new:
                write_json(new / DESCRIPTION, listed)
                comparison.save_grid(store, concept, [(label, folder)], listed, new / "grid.png", SHOWN)
    return Report(stamp, skipped, time.monotonic() - started, folder, {}, {"grid": folder / "grid.png"})


def listing_of(store: Store, label: str, concept: str) -> Listing:
    """What the folder of a column holds now.

    Raises:
        InputError: there is no such column, or its folder is gone or not as its layout wants it; the message says where
            the column is described, so that whoever cannot mend the folder can leave the column out.
    """
    column = read_column(store, label, concept)
    try:
        return column.listing(store)
    except InputError as error:
        described = store.external(label, concept)
        raise InputError(
            f"{error}. {described} describes this column; correct it there, or remove that file to leave the column out"
        ) from None


def _templates(listing: Listing, concept: Concept, mention: str | None) -> dict[str, str | None]:
    """Prompt -> its template, or None where it does not mention the concept.

    Raises:
        InputError: none does, or a text encoder would not read one as words.
    """
    for image in listing.images:
        try:
            check_read_as_words(image.prompt)
        except InputError as error:
            raise InputError(f"{image.file.as_posix()}: {error}") from None
    mentions = Mentions(concept, mention)
    found = {prompt: mentions.template(prompt) for prompt in dict.fromkeys(image.prompt for image in listing.images)}
    if all(template is None for template in found.values()):
        words = repr(mention) if mention else f"{concept.placeholder!r} or {concept.class_noun!r}"
        raise InputError(
            f"none of the {len(found)} prompts mentions the concept {concept.name!r} as {words}, such as "
            f"{shown(next(iter(found)))}; say by --mention what stands for it in the prompts"
        )
    return found


def _hashes(folder: Path, images: Sequence[ExternalImage], what: str, listener: Listener) -> list[str]:
    from personalize_core.metrics.preprocessing import in_threads

    found: list[str] = []
    for start in range(0, len(images), MOST_HASHED):
        listener(Event(what, start, len(images)))
        found += in_threads(sha256, [folder / image.file for image in images[start : start + MOST_HASHED]])
    listener(Event(what, len(images), len(images)))
    return found


def _places(
    images: Sequence[ExternalImage], hashes: Sequence[str], place: dict[str, int], templates: dict[str, str | None]
) -> list[dict[str, Any]]:
    """Each image in its place: those of a prompt are numbered by seed, then by name, whatever the layout's order."""
    number: Counter[int] = Counter()
    rows = []
    known = zip(images, hashes, strict=True)
    for image, digest in sorted(known, key=lambda one: (one[0].seed is None, one[0].seed, one[0].file.as_posix())):
        prompt = place[str(templates[image.prompt])]
        about = {"file": image.file.as_posix(), "prompt": prompt, "image": number[prompt], "seed": image.seed}
        rows.append(about | {"words": image.prompt, "sha256": digest})
        number[prompt] += 1
    return sorted(rows, key=lambda row: (row["prompt"], row["image"]))


def _folder(store: Store, column: ExternalColumn) -> str:
    """As results name it: relative to the workspace if it lies there, so that they are the same bytes elsewhere."""
    path = column.path(store).resolve()
    root = store.root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
