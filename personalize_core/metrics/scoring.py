"""Score images: which features are compared with which, and the rows of the table of scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from personalize_core.concepts.concept import Concept
from personalize_core.concepts.masks import own_masks
from personalize_core.errors import InputError
from personalize_core.files.stamps import sha256
from personalize_core.metrics import masc, masks, similarity, tables
from personalize_core.metrics.encoders import Encoder
from personalize_core.metrics.features import Encoders, Processing, Seen
from personalize_core.metrics.preprocessing import in_threads
from personalize_core.metrics.references import ALONE, reference_sets, why_none_held_out
from personalize_core.metrics.tables import ALL_PAIRS, HELD_OUT, MEASURES, OTHER_REAL, SCALED, TRAINED_ON
from personalize_core.sampling.grid import located, read_grid

MOST_ROWS = 4096  # as dictionaries


@dataclass
class Scored:
    """The scores, and why others are absent.

    Rows become columns a few thousand at a time: as dictionaries, those of ten thousand images take 100 MB.
    """

    without_identity: Set[int] = frozenset()  # places of prompts of which only scores with a text are kept
    absent: list[dict[str, Any]] = field(default_factory=list)  # metric, encoder, image (None: all of each), reason
    images: list[dict[str, Any]] = field(default_factory=list)  # what the rows of each sampled image begin with
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _parts: list[pl.DataFrame] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """row: as `tables.from_rows` takes them."""
        if not MEASURES[row["metric"]].reads_text and row.get("prompt_index") in self.without_identity:
            return
        self._rows.append(row)
        if len(self._rows) == MOST_ROWS:
            self._to_columns()

    @property
    def table(self) -> pl.DataFrame:
        self._to_columns()
        return tables.checked(pl.concat(self._parts))

    def _to_columns(self) -> None:
        self._parts.append(tables.unchecked(self._rows))
        self._rows = []


def texts_of(template: str, concept: Concept) -> dict[str, str]:
    """Text variant -> the text that CLIP-T compares an image of this prompt template with."""
    slots = {"class_phrase": concept.class_noun, "slot_deleted": "", "full_prompt": concept.placeholder}
    return {variant: template.replace("{}", words) for variant, words in slots.items()}


def score_grid(
    root: Path,
    grid: Path,
    concept: Concept,
    concept_images: Sequence[Path],
    encoders: Encoders,
    without_identity: Set[int] = frozenset(),
    processing: Processing | None = None,
    held_out: Sequence[Path] | None = None,
) -> Scored:
    """Every image of a grid: CLIP-T with its prompt, CLIP-I and DINO with the concept images.

    Args:
        without_identity: places of prompts that change the look of the concept, so that a protocol wants no likeness
            to its concept images there: those images have no rows but CLIP-T's.
        held_out: more images of the concept, that nothing was trained on. CLIP-I and DINO then are with these, and
            "_trained_on" with `concept_images` beside them. None: images are not held out here at all.

    Raises:
        InputError: the grid's description or an image that it lists is missing or damaged, or masks that came with
            the concept do not fit.
    """
    described = read_grid(grid)
    images = located(grid, described, root)
    paths = [image.path for image in images]
    if lacking := [path for path in paths if not path.is_file()]:
        raise InputError(
            f"{lacking[0]} is missing from its grid ({len(lacking)} of {len(paths)}); sample the grid again"
        )
    about = [
        {
            "base_model": described["base_model"],
            "concept": described["concept"],
            "method": described["method"],
            "variant": image.variant,
            "prompt_index": image.prompt,
            "prompt": described["templates"][image.prompt],
            "image_index": image.image,
            "seed": image.seed,
            "source": described["external"]["source"] if "external" in described else None,
            "image": (path.relative_to(root) if path.is_relative_to(root) else path).as_posix(),
            "image_sha256": digest,
        }
        for image, path, digest in zip(images, paths, in_threads(sha256, paths), strict=True)
    ]
    noun, found = concept.class_noun, Scored(without_identity)
    made_elsewhere = "external" in described
    sampled = Seen.of(paths, noun, None, encoders, processing, "leave_out" if made_elsewhere else "raise")
    if sampled.left_out:  # and sampled has no features of them
        found.absent += [_absence(None, None, about[place]["image"], reason) for place, reason in sampled.left_out]
        readable = sorted(set(range(len(images))) - {place for place, _ in sampled.left_out})
        images, about = [images[place] for place in readable], [about[place] for place in readable]

    found.images = about
    templates = [texts_of(template, concept) for template in described["templates"]]
    for variant in encoders.texts:
        said = [templates[image.prompt][variant] for image in images]
        written = [index for index, words in enumerate(said) if words.strip()]
        metric = "clip_t" if variant == "class_phrase" else f"clip_t_{variant}"
        names = (metric, f"{metric}_scaled")
        for index in set(range(len(said))) - set(written):
            found.absent += [_absence(n, None, about[index]["image"], "its prompt leaves no text") for n in names]
        distinct = sorted({said[index] for index in written})
        for number, encoder in enumerate(encoders.text_image if distinct else ()):
            place = {words: row for row, words in enumerate(distinct)}
            texts = encoder.texts(distinct)[[place[said[index]] for index in written]]
            seen = sampled.features["clip_i", encoder.name, False][written]
            usable = _usable(seen) & _usable(texts)
            cosines = (
                _spread(similarity.text_alignment_per_image(seen[usable], texts[usable]), usable)
                if usable.any()
                else []
            )
            for name in names:
                for index, cosine in zip(written, cosines or [None] * len(written), strict=True):
                    score = cosine
                    if cosine is not None and MEASURES[name].scaling == SCALED:
                        score = float(similarity.clip_score(torch.tensor(cosine, dtype=torch.float64)))
                    _add(found, name, encoder, number == 0, about[index] | {"text": said[index]}, score, 1)
    prompts = [masc.without_subject(templates[image.prompt]["class_phrase"], noun) for image in images]
    own = [image.path for image in images]
    if why := why_none_held_out(concept_images, held_out):
        _all_absent(found, encoders, [HELD_OUT], why)
    for references, some in reference_sets(concept_images, held_out).items():
        known = Seen.of_concept_images(some, noun, encoders)
        for metric, encoder, headline in encoders.of_images:
            how = {"references": references}
            _compare(found, metric, encoder, headline, about, sampled, known, encoders.segmenter, _with_all, how)
        first = references != TRAINED_ON or held_out == []  # the prompts are the same with either set
        _add_masc(found, about, own, prompts, noun, some, encoders, references, follow=first)
    found.absent += [_absence(None, None, image, reason) for image, reason in described.get("left_out", ())]
    return found


def score_references(
    root: Path,
    concept: Concept,
    concept_images: Sequence[Path],
    encoders: Encoders,
    held_out: Sequence[Path] | None = None,
) -> Scored:
    """The concept images, each with all the others: CLIP-I and DINO. One alone has no others, and no row.

    held_out: as `score_grid` takes them. Each image that was trained on then is compared with all that were held out,
    and each of these with all that were trained on, so that both metrics have the same mean.
    """
    found, noun = Scored(), concept.class_noun
    sets = reference_sets(concept_images, held_out)
    if why := why_none_held_out(concept_images, held_out):
        _all_absent(found, encoders, [HELD_OUT], why)
    if len(concept_images) < 2 and not held_out:
        _all_absent(found, encoders, list(sets), ALONE)
        return found
    seen = {references: Seen.of_concept_images(some, noun, encoders) for references, some in sets.items()}
    real: dict[str, Any] = {"concept": concept.name, "method": tables.CEILING, "variant": tables.CEILING}
    for references, known in seen.items():
        other = {HELD_OUT: TRAINED_ON, TRAINED_ON: HELD_OUT}[references] if len(sets) > 1 else references
        about = [
            real | {"image_index": index, "image": path.relative_to(root).as_posix(), "image_sha256": sha256(path)}
            for index, path in enumerate(sets[other])
        ]
        alike = _with_others if other == references else _with_all
        how = {"references": references, "pairing": OTHER_REAL if other == references else ALL_PAIRS}
        for metric, encoder, headline in encoders.of_images:
            _compare(found, metric, encoder, headline, about, seen[other], known, encoders.segmenter, alike, how)
        _add_masc(found, about, sets[other], None, noun, sets[references], encoders, references)
    return found


def _all_absent(found: Scored, encoders: Encoders, references: Sequence[str], reason: str) -> None:
    for metric, encoder, _ in encoders.of_images:
        for masked in (False, True) if encoders.segmenter else (False,):
            for each in references:
                name = tables.compared(metric, masked, each == TRAINED_ON)
                found.absent.append(_absence(name, encoder, None, reason))
    if encoders.masc:
        names = [tables.compared("masc_cp", False, each == TRAINED_ON) for each in references]
        found.absent += [_absence(name, encoders.masc, None, reason) for name in names]


# -- features to rows -----------------------------------------------------------------------------------------


def _with_all(images: Tensor, references: Tensor, looks_for: str | None) -> tuple[Tensor, int]:
    """Each image's mean cosine with all references, and how many those are."""
    return similarity.image_alignment_per_image(images, references, looks_for), len(references)


def _with_others(images: Tensor, references: Tensor, looks_for: str | None) -> tuple[Tensor, int]:
    return similarity.real_alignment_per_image(references), len(references) - 1


def _compare(
    found: Scored,
    metric: str,
    encoder: Encoder,
    headline: bool,
    about: Sequence[dict[str, Any]],
    sampled: Seen,
    known: Seen,
    segmenter: masks.Segmenter | None,
    alike: Callable[[Tensor, Tensor, str | None], tuple[Tensor, int]],
    how: Mapping[str, str],
) -> None:
    """Rows of one encoder that compare images with the concept's images, whole and masked.

    A sampled image in which the encoder does not find what it looks for has 0. A concept image in which it does not is
    left out: it says nothing of the concept.

    how: of the rows' contract, references and, where it does not follow from the method, pairing.
    """
    for masked in (False, True) if segmenter else (False,):
        name = tables.compared(metric, masked, how["references"] == TRAINED_ON)
        if masked and (why := known.unmasked_for or sampled.unmasked_for):
            found.absent.append(_absence(name, encoder, None, why))
            continue
        images, references = (seen.features[metric, encoder.name, masked] for seen in (sampled, known))
        usable, bare, looks_for = _usable(images), ~images.any(dim=1), encoder.looks_for
        of_concept = about[0]["method"] == tables.CEILING
        if looks_for:
            shown = references.any(dim=1)
            if int(shown.sum()) < (fewest := 2 if alike is _with_others else 1):
                why = f"a {looks_for} is found in {int(shown.sum())} of {len(shown)} concept images; it takes {fewest}"
                found.absent.append(_absence(name, encoder, None, why))
                continue
            if not of_concept:
                why = f"no {looks_for} is found in this concept image, so no image is compared with it"
                lacking = [path for path, there in zip(known.paths, shown, strict=True) if not there]
                found.absent += [_absence(name, encoder, path.name, why) for path in lacking]
                usable |= bare
            references = references[shown]
        if not _usable(references).all():
            found.absent.append(_absence(name, encoder, None, "its features of a concept image are zero or not finite"))
            continue
        values, pairs = alike(images[usable], references, looks_for) if usable.any() else (torch.empty(0), 1)
        for index, score in enumerate(_spread(values, usable)):
            if looks_for and of_concept and bare[index]:
                why = f"no {looks_for} is found in this concept image"
                found.absent.append(_absence(name, encoder, about[index]["image"], why))
                continue
            more: dict[str, Any] = dict(how)
            if masked and segmenter and sampled.foreground:
                more |= {"mask": masks.rule(segmenter), "foreground": sampled.foreground[index]}
            _add(found, name, encoder, headline, about[index] | more, score, pairs)


def _add_masc(
    found: Scored,
    about: Sequence[dict[str, Any]],
    paths: Sequence[Path],
    prompts: Sequence[str] | None,
    class_noun: str,
    concept_images: Sequence[Path],
    encoders: Encoders,
    kind: str,
    follow: bool = True,
) -> None:
    """Rows of MaSC. prompts: without their subject; None: the images are concept images, each with the others.

    kind: of tables' references. follow: whether prompt following is measured too.
    """
    if not (network := encoders.masc) or not (segmenter := encoders.segmenter):
        return
    name, pairing = tables.compared("masc_cp", False, kind == TRAINED_ON), {}
    within = prompts is None and list(paths) == list(concept_images)
    if prompts is None:
        pairing = {"pairing": OTHER_REAL if within else ALL_PAIRS}
    references = list(masc.look(network, concept_images, class_noun, own_masks(concept_images), segmenter))
    empty = [path.name for path, one in zip(concept_images, references, strict=True) if not one.foreground.any()]
    if empty:
        why = f"no patch of the concept image {empty[0]} shows its {class_noun}; put better masks beside the images"
        found.absent.append(_absence(name, network, None, why))
    masks_of = own_masks(paths) if prompts is None else None
    seen = references if within else masc.look(network, paths, class_noun, masks_of, segmenter)
    distinct = sorted({words for words in prompts or () if words})
    texts = dict(zip(distinct, network.texts(distinct), strict=True)) if distinct else {}
    for index, image in enumerate(seen):
        row = about[index] | {"mask": masc.rule(segmenter), "foreground": image.share}
        others = [one for place, one in enumerate(references) if not within or place != index]
        if not empty:
            alike = [masc.concept_preservation(one, image) for one in others]
            score = sum(alike) / len(alike)
            _add(
                found,
                name,
                network,
                True,
                row | {"references": kind} | pairing,
                score if isfinite(score) else None,
                len(alike),
            )
        if prompts is None or not follow:
            continue
        if not (words := prompts[index]):
            found.absent.append(_absence("masc_pf", network, row["image"], "its prompt leaves no text"))
        elif image.background is None:
            found.absent.append(_absence("masc_pf", network, row["image"], "its mask leaves no background"))
        else:
            score = float(F.cosine_similarity(image.background.double(), texts[words].double(), dim=0))
            _add(found, "masc_pf", network, True, row | {"text": words}, score if isfinite(score) else None, 1)


def _add(
    found: Scored,
    metric: str,
    encoder: Encoder | masc.NaFlex,
    headline: bool,
    about: Mapping[str, Any],
    score: float | None,
    pairs: int,
) -> None:
    if score is None:
        found.absent.append(_absence(metric, encoder, about["image"], "its features are zero or not finite"))
        return
    measured = {
        "metric": metric,
        "encoder": encoder.name,
        "encoder_sha256": encoder.weights_hash,
        "preprocessing": encoder.preprocessing,
        "headline": headline,
        "pairs": pairs,
        "score": score,
    }
    found.add({**about, **measured})


def _absence(
    metric: str | None, encoder: Encoder | masc.NaFlex | None, image: str | None, reason: str
) -> dict[str, Any]:
    return {"metric": metric, "encoder": encoder.name if encoder else None, "image": image, "reason": reason}


def _usable(rows: Tensor) -> Tensor:
    """(N) bool: which features have a direction."""
    lengths = rows.double().norm(dim=1)
    return lengths.isfinite() & (lengths > 0)


def _spread(values: Tensor, usable: Tensor) -> list[float | None]:
    """The values in their places among all N; None elsewhere."""
    places = np.full(len(usable), -1)
    places[usable.numpy()] = np.arange(int(usable.sum()))
    cosines = values.tolist()
    return [None if place < 0 else float(cosines[place]) for place in places]
