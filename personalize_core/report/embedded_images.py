"""The sampled images as the page shows them: all variants of one prompt and noise in a column, and no more than fit."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from PIL import Image, ImageOps

from personalize_core.errors import InputError, listed, together
from personalize_core.files.stamps import sha256
from personalize_core.metrics.tables import CEILING
from personalize_core.report.display_names import in_words
from personalize_core.report.evidence import METRICS, ConceptTold, Evidence
from personalize_core.report.figures.images import opened
from personalize_core.workspace import commands
from personalize_core.workspace.store import Store, is_label

PIXELS = 120_000_000  # of all images in a page together: some 15 MB
SIDES = (768, 512, 384, 256, 192, 128)  # pixels of an image's longer side, at most; the largest that fits
SMALL = 128  # pixels; an image that is no larger is kept as it is, pixel for pixel
MOST_OF_A_PROMPT = 4  # images, however few there are in all
MOST_PROMPTS = 60  # of a concept; an external column may have a prompt for each of its images
MOST_NAMED = 4  # images of a cell that are gone


@dataclass(frozen=True)
class Cell:
    """One image in its place."""

    uri: str
    alt: str
    caption: str  # with its own scores


@dataclass(frozen=True)
class Column:
    """One prompt and one noise: the same for all rows."""

    prompt_index: int
    prompt: str
    image_index: int
    first: bool  # of its prompt


@dataclass(frozen=True)
class Grid:
    """The images of one concept by all variants."""

    concept: ConceptTold
    concept_images: Sequence[str]  # as data URIs
    columns: Sequence[Column]
    rows: Mapping[str, Sequence[Cell | None]]  # variant -> a cell for each column; None: no image


@dataclass(frozen=True)
class Chosen:
    """How much of all images the page shows."""

    of_a_prompt: int
    concepts: int
    side: int


def grids(evidence: Evidence, pixels: int = PIXELS) -> tuple[list[Grid], str]:
    """A grid for each concept, and a sentence about what does not stand in them; empty if all does.

    Raises:
        InputError: images that were scored are not there any more, all of which are named, or one that is shown is
            another by now.
    """
    scored = evidence.scores.filter(pl.col("method") != CEILING)
    _check_all_there(evidence, scored)
    sampled = _in_columns(scored)
    chosen = _chosen(evidence, sampled, pixels)
    shown = [_grid(concept, evidence, sampled, chosen) for concept in evidence.concepts[: chosen.concepts]]
    return shown, _left_out(evidence, sampled, chosen)


def _in_columns(sampled: pl.DataFrame) -> pl.DataFrame:
    """The same with prompt_index the place of a prompt among all of its concept: those of images sampled here first.

    An external column has the prompts in an order of its own; equal texts are one column.
    """
    here = sampled.filter(pl.col("source").is_null())
    known = here.select("concept", "prompt", "prompt_index").unique().sort("concept", "prompt_index")
    first = known.unique(["concept", "prompt"], keep="first", maintain_order=True)
    others = sampled.filter(pl.col("source").is_not_null()).sort("variant", "prompt_index")
    new = others.join(first, on=["concept", "prompt"], how="anti").select("concept", "prompt")
    beyond = max(known["prompt_index"].to_list(), default=-1) + 1
    new = new.unique(maintain_order=True).with_columns(prompt_index=beyond + pl.int_range(pl.len()).over("concept"))
    columns = ["concept", "prompt", "prompt_index"]
    places = pl.concat([first.select(columns), new.select(columns)])
    moved = others.drop("prompt_index").join(places, on=["concept", "prompt"]).select(sampled.columns)
    return pl.concat([here, moved])


def _chosen(evidence: Evidence, sampled: pl.DataFrame, pixels: int) -> Chosen:
    """Smaller images first, then fewer of a prompt, then fewer concepts."""
    most = min(MOST_OF_A_PROMPT, int(sampled["image_index"].n_unique()))
    native = _native(evidence, sampled)
    shown = sampled.filter(pl.col("prompt_index").rank("dense").over("concept") <= MOST_PROMPTS)
    places = shown.select("concept", "variant", "prompt_index").unique()
    each = {name: len(places.filter(concept=name)) for name in places["concept"].unique()}
    for concepts in range(len(evidence.concepts), 0, -1):
        cells = sum(each[concept.name] for concept in evidence.concepts[:concepts])
        for of_a_prompt in range(most, 0, -1):
            for side in [min(side, native) for side in SIDES]:
                if cells * of_a_prompt * side**2 <= pixels:
                    return Chosen(of_a_prompt, concepts, side)
    return Chosen(1, 1, SIDES[-1])


def _grid(concept: ConceptTold, evidence: Evidence, sampled: pl.DataFrame, chosen: Chosen) -> Grid:
    own = sampled.filter(concept=concept.name)
    images = own["image_index"].unique().sort().to_list()[: chosen.of_a_prompt]
    prompts = own.select("prompt_index", "prompt").unique().sort("prompt_index", "prompt").rows()[:MOST_PROMPTS]
    places = [(*prompt, image) for prompt in prompts for image in images]
    found: dict[tuple, dict[str, Any]] = {}
    for row in own.filter(pl.col("image_index").is_in(images)).iter_rows(named=True):
        place = (row["variant"], row["prompt_index"], row["prompt"], row["image_index"])
        found.setdefault(place, row | {"scores": {}})["scores"][row["metric"]] = row["score"]
    rows = {
        variant: [
            _cell(evidence, found[variant, *place], concept, chosen.side) if (variant, *place) in found else None
            for place in places
        ]
        for variant in evidence.variants
        if any((variant, *place) in found for place in places)
    }
    columns = [
        Column(index, (prompt or "").replace("{}", concept.class_noun), image, image == images[0])
        for index, prompt, image in places
    ]
    return Grid(concept, [concept_image(path) for path in concept.concept_images], columns, rows)


def _cell(evidence: Evidence, row: Mapping[str, Any], concept: ConceptTold, side: int) -> Cell:
    path, variant = evidence.root / row["image"], in_words(row["variant"])
    if sha256(path) != row["image_sha256"]:
        raise InputError(f"{path} has changed since it was scored; {_way_out(evidence, row['method'], concept.name)}")
    prompt = (row["prompt"] or "").replace("{}", concept.class_noun)
    own = row["scores"]
    scores = ", ".join(
        f"{words} {own[name]:.3f}".replace("-", "\u2011") for name, words in METRICS.items() if name in own
    )
    about = f"{variant}: {prompt}, {_which(row)}"
    return Cell(data_uri(opened(path), side), f"{concept.name} by {about}", f"{about}. {scores}")


def _which(row: Mapping[str, Any]) -> str:
    if row["source"] is None:
        return f"noise {row['image_index'] + 1}"
    return f"image {row['image_index'] + 1}" + (f", seed {row['seed']}" if row["seed"] is not None else "")


def _left_out(evidence: Evidence, sampled: pl.DataFrame, chosen: Chosen) -> str:
    parts, images = [], int(sampled["image_index"].n_unique())
    if chosen.of_a_prompt < images:
        parts.append(f"the first {chosen.of_a_prompt} of {images} images of each prompt")
    if (prompts := int(sampled.group_by("concept").agg(pl.col("prompt").n_unique())["prompt"].max())) > MOST_PROMPTS:  # type: ignore[arg-type]
        parts.append(f"the first {MOST_PROMPTS} of {prompts:,} prompts")
    if chosen.concepts < len(evidence.concepts):
        parts.append(f"the first {chosen.concepts} of {len(evidence.concepts)} concepts")
    if chosen.side < _native(evidence, sampled):
        parts.append(f"images made smaller, to {chosen.side} pixels")
    return f"Shown here: {'; '.join(parts)}. The scores are of all." if parts else ""


def concept_image(path: Path) -> str:
    return data_uri(opened(path), 384)


def data_uri(image: Image.Image, side: int = 1200) -> str:
    """An image for the page; small ones keep every pixel."""
    if max(image.size) > side:
        image = ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)
    how: dict[str, Any] = {"lossless": True, "exact": True} if max(image.size) <= SMALL else {"quality": 84}
    bare = Image.new("RGB", image.size)
    bare.paste(image)  # without the original's metadata
    content = io.BytesIO()
    bare.save(content, "WEBP", **how)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def _native(evidence: Evidence, sampled: pl.DataFrame) -> int:
    """Pixels of the longer side of an image; the largest of all variants, of which one image each is looked at."""
    first = sampled.unique("variant", keep="first", maintain_order=True)["image"]
    return max(max(_size(evidence.root / image)) for image in first)


def _size(path: Path) -> tuple[int, int]:
    return opened(path).size


def _check_all_there(evidence: Evidence, scored: pl.DataFrame) -> None:
    """Raise InputError where images are gone, with those of each method and concept and what to do about them."""
    gone: dict[tuple[str, str], list[Path]] = {}
    for method, concept, image in scored.select("method", "concept", "image").unique(maintain_order=True).iter_rows():
        if not (path := evidence.root / image).is_file():
            gone.setdefault((method, concept), []).append(path)
    if gone:
        raise together(
            [
                InputError(
                    f"images of {concept!r} by {in_words(method)} were scored and are gone: "
                    f"{listed(paths, MOST_NAMED)}; {_way_out(evidence, method, concept)}"
                )
                for (method, concept), paths in gone.items()
            ]
        )


def _way_out(evidence: Evidence, method: str, concept: str) -> str:
    """How the report gets on where images are not as they were scored."""
    store = Store(evidence.root, evidence.protocol)
    again = f"run `{commands.grid(store, concept, method)}`"
    then = f"`{commands.personalize(store, 'report')}` goes on then"
    if not is_label(method):
        return f"{again}, which samples them again; {then}"
    described = store.external(method, concept)
    return (
        f"put them back, or {again}, which scores what is there now, or remove {described}, which leaves the column "
        f"out; {then}"
    )
