"""The report itself: one HTML file that needs nothing else, and beside it every figure and table as a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from personalize_core.errors import listed
from personalize_core.files.atomic import write_bytes
from personalize_core.metrics import pairing
from personalize_core.metrics.ranking import UNDECIDED
from personalize_core.metrics.tables import ALL_CONCEPTS, CEILING
from personalize_core.report import embedded_images, inline_figures, published, tables
from personalize_core.report import evidence as read_evidence
from personalize_core.report import verdicts as told
from personalize_core.report.display_names import each_in_words, in_words
from personalize_core.report.ended_early import ended_in_words
from personalize_core.report.evidence import METRICS, ConceptTold, Evidence, MethodTold, Shown
from personalize_core.report.figures.images import opened_figure
from personalize_core.report.figures.style import variant_colours
from personalize_core.report.verdicts import baseline_in_words
from personalize_core.workspace.store import FIGURES, PAGE, Store

TABLES = "tables"  # in the folder of a report
MOST_WATCHED = 2  # concepts of a method whose probes are shown
MOST_HEAT_MAPS = 6  # of a method


@dataclass(frozen=True)
class EmbeddedImage:
    """One image of a method, embedded."""

    uri: str
    caption: str


def write(store: Store, folder: Path) -> None:
    """Report the last comparison: report.html, figures/NAME.png and .svg, tables/NAME.parquet, .csv and .tex.

    Raises:
        InputError: nothing has been compared, or an image that was scored is gone.
    """
    evidence = read_evidence.read(store)
    shown = embedded_images.grids(evidence)  # first: an image that is gone stops it at once
    figures, made = inline_figures.every(evidence), tables.every(evidence)
    page = render(evidence, shown, figures, made)
    for figure in figures.values():
        write_bytes(folder / FIGURES / f"{figure.name}.svg", figure.svg)
        write_bytes(folder / FIGURES / f"{figure.name}.png", figure.png)
    for table in made.values():
        table.write(folder / TABLES)
    write_bytes(folder / PAGE, page.encode())


def render(
    evidence: Evidence,
    shown: tuple[Sequence[embedded_images.Grid], str],
    figures: dict[str, inline_figures.InlineFigure],
    made: dict[str, tables.Table],
) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("personalize_core.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "in_words": in_words,
        "each_in_words": each_in_words,
        "breakable": breakable,
    }
    environment.globals["packaged"] = lambda name: Markup((environment.loader.get_source(environment, name))[0])  # type: ignore[union-attr]
    grids, left_out = shown
    colours = variant_colours(evidence.variants, evidence.baseline)
    return environment.get_template("page.html").render(
        evidence=evidence,
        title=title(evidence),
        counted=counted(evidence),
        questions=_by_question(told.verdicts(evidence)),
        notes=told.notes(evidence),
        caution=told.caution(evidence),
        undecided=UNDECIDED,
        metric_names=METRICS,
        figures=figures,
        narrow=inline_figures.narrow(evidence),
        tables=made,
        swatches={variant: inline_figures.THEMED[colour] for variant, colour in colours.items()},
        grids=grids,
        left_out=left_out,
        methods=[_told(method, evidence) for method in evidence.methods],
        published=published.in_short(published.beside(published.Ours.of(evidence))),
        measured=measured(evidence),
        missing=missing(evidence),
    )


def _by_question(verdicts: Sequence[told.Verdict]) -> dict[str, list[told.Verdict]]:
    """Two metrics may answer one question."""
    found: dict[str, list[told.Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.question, []).append(verdict)
    return found


def title(evidence: Evidence) -> str:
    variants, concepts = len(evidence.variants), len(evidence.concepts)
    return f"{_some(variants, 'variant')} of {_some(concepts, 'concept')}, compared"


def counted(evidence: Evidence) -> str:
    """What was sampled, in a line."""
    sampled = evidence.scores.filter(pl.col("method") != CEILING)
    total = sampled["image"].n_unique()
    images = sorted(set(sampled.group_by("variant").agg(pl.col("image").n_unique())["image"]))
    each = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
    protocol = f"protocol {evidence.protocol}" if evidence.protocol else "sampled as in params.yaml"
    return f"Base model {evidence.base_model}; {protocol}; {total:,} images, {each} of each variant"


def measured(evidence: Evidence) -> list[tuple[str, str]]:
    """What a reviewer asks for, besides the contract of every score."""
    sampled = evidence.scores.filter(pl.col("method") != CEILING)
    prompts = sampled["prompt"].drop_nulls().unique().sort().to_list()
    summary = evidence.summary.filter(pl.col("concept") == ALL_CONCEPTS, pl.col("method") != CEILING)
    over = sorted(set(summary["over"].drop_nulls()))
    sampling = "; ".join(", ".join(f"{name} {value}" for name, value in how.items()) for how in evidence.sampling)
    seeds = ", ".join(map(str, evidence.seeds))
    concept_images = ", ".join(f"{concept.name} ({_images_of(concept)})" for concept in evidence.concepts)
    return [
        ("Base model", evidence.base_model),
        ("Protocol", evidence.protocol or "none by name: the section “sampling” of params.yaml"),
        ("Sampled with", f"{sampling or 'not recorded'}; seed {seeds or 'not recorded'}"),
        ("Concepts (concept images)", concept_images),
        (f"Prompts ({len(prompts)})", "; ".join(prompt.replace("{}", "…") for prompt in prompts)),
        ("Images", counted(evidence)),
        (
            "Pairing",
            "Images of one concept, prompt and image number that were sampled here start from the same noise, whatever "
            "the variant; differences are taken image by image."
            + (f" Images made elsewhere are compared {pairing.MEANING}." if evidence.external else ""),
        ),
        (
            "Averages",
            f"Over a prompt's images, then over prompts, then over concepts (macro). {_likeness(evidence)}",
        ),
        (
            "Intervals",
            f"95 %, over {' and over '.join(over) if over else 'nothing, for nothing was repeated'}: a hierarchical "
            "bootstrap of concepts and prompts, widened for how few there are.",
        ),
        (
            "Verdicts",
            "All pairs of a score at once: simultaneous intervals at the level of Tukey's studentized range. Where a "
            "pair's interval contains zero, the verdict is “undecided”: the two cannot be told apart.",
        ),
        *_judge(evidence),
    ]


def _judge(evidence: Evidence) -> list[tuple[str, str]]:
    """Nothing where no model was asked."""
    if not (said := tables.judged(evidence.every_score).strip()):
        return []
    return [
        (
            "Judge",
            f"{said} It answers a question about each image with a whole number from 0 to 4, here divided by 4. No "
            "verdict above rests on it.",
        )
    ]


def _images_of(concept: ConceptTold) -> str:
    total, held_out = len(concept.concept_images), concept.held_out
    if held_out is None:
        return str(total)
    return f"{total - held_out} trained on, {held_out} held out" if held_out else f"all {total} trained on"


def _likeness(evidence: Evidence) -> str:
    if all(concept.held_out is None for concept in evidence.concepts):
        return (
            "Likeness to the concept is the mean cosine with all of its concept images; their cosines with each other "
            "are the ceiling."
        )
    return (
        "Likeness to the concept is the mean cosine with its concept images that are held out from training; with "
        "those that were trained on, it stands beside it. The cosines of the ones with the others are the ceiling."
    )


def _few_images(evidence: Evidence) -> list[str]:
    """A sentence for each concept of which nothing is held out, though some images were asked for."""
    return [
        f"Of {concept.name}, no image is held out: it has {_some(len(concept.concept_images), 'concept image')}, too "
        "few, and all are trained on. It has no score with images held out."
        for concept in evidence.concepts
        if concept.held_out == 0
    ]


def missing(evidence: Evidence) -> list[str]:
    """What this report does not hold, and what follows from it."""
    found = _not_scored(evidence.missing)
    reasons = Counter(str(one.get("reason", "no reason is given")) for one in evidence.absent)
    found += [f"{_some(count, 'score')} could not be computed: {reason}" for reason, count in reasons.items()]
    found += _few_images(evidence)
    scored = set(evidence.scores.filter(pl.col("method") == CEILING)["concept"])
    if alone := [concept.name for concept in evidence.concepts if concept.name not in scored]:
        found.append(f"Concept images were not compared with each other for {', '.join(alone)}: no ceiling there.")
    if evidence.differences is None:
        words = baseline_in_words(evidence.baseline)
        found.append(f"{words[:1].upper()}{words[1:]}, was not scored, so there is no baseline.")
    lacking = evidence.pairs.filter(pl.col("unpaired") > 0).select("variant", "other").n_unique()
    if lacking:
        found.append(f"Of {_some(lacking, 'pair')} of variants, some images had no counterpart and were left out.")
    known = [evidence.costs.get(variant, {}) for variant in evidence.variants]
    costs = [words for name, words in tables.COSTS.items() if any(one.get(name) is None for one in known)]
    if costs:
        found.append(f"Costs not recorded for some or all variants: {', '.join(costs).lower()}.")
    if len(evidence.pairs) and evidence.pairs["training_noise"].null_count():
        found.append("The noise of training (the same method, another seed) is not measured for some or all variants.")
    if not any(method.heat_maps for method in evidence.methods):
        found.append("There are no heat maps; `personalize heat-maps` makes them.")
    if evidence.agreement is None or evidence.people.get("automated"):
        found.append("No human study was made; `personalize study` builds its page.")
    return found


def _not_scored(cells: Sequence[str]) -> list[str]:
    """A sentence for all methods that lack the same concepts."""
    lacking: dict[str, list[str]] = {}
    for cell in cells:
        method, _, concept = cell.rpartition("/")
        lacking.setdefault(method, []).append(concept)
    together: dict[str, list[str]] = {}
    for method, concepts in lacking.items():
        together.setdefault(listed(concepts), []).append(in_words(method))
    return [f"There are no scores of {concepts} by {listed(methods)}." for concepts, methods in together.items()]


def breakable(text: str) -> Markup:
    """A cell's text, in which a name such as clip_t_slot_deleted may be broken behind an underscore."""
    return Markup("_<wbr>").join(text.split("_"))


def _told(method: MethodTold, evidence: Evidence) -> dict[str, Any]:
    """A method as the template needs it."""
    config = method.learned[0].described.get("config", {}) if method.learned else {}
    differing = [one.concept for one in method.learned[1:] if one.described.get("config", {}) != config]
    costs = evidence.costs.get(method.variants[0], {})
    return {
        "method": method,
        "recipe": tables.recipe(config, method.published),
        "differing": differing,
        "costs": []
        if not method.learned
        else [
            *((words, tables.for_people(name, costs.get(name))) for name, words in tables.COSTS.items()),
            *((words, costs[name]) for name, words in tables.MEASURED_ON.items() if costs.get(name)),
        ],
        "losses": f"losses_{method.name}".replace("@", "-"),
        "fixed": [(one.concept, _fell(one.fixed_batch)) for one in method.learned if one.log and one.fixed_batch],
        "ended": [(one.concept, words) for one in method.learned if (words := ended_in_words(one))],
        "watched": [(one.concept, _embedded(one.watched)) for one in method.learned[:MOST_WATCHED] if one.watched],
        "heat_maps": _embedded(method.heat_maps[:MOST_HEAT_MAPS]),
        "more_heat_maps": max(0, len(method.heat_maps) - MOST_HEAT_MAPS),
        "analyses": [
            {
                "concept": concept,
                "title": one.title,
                "how": one.how,
                "metrics": [(name, _value(value)) for name, value in one.metrics.items()],
                "absent": list(one.absent.items()),
                "images": _embedded(one.images),
            }
            for concept, found in method.analyses.items()
            for one in found
        ],
    }


def _fell(fixed: Any) -> str:
    """How far the loss on a fixed batch fell, and whether its interval excludes 0."""
    low, high = fixed["interval_95"]
    losses = f"{fixed['before']:.4f} before, {fixed['after']:.4f} after"
    return f"{losses}; fell by {fixed['fell_by']:.4f} [{low:.4f}, {high:.4f}]" + (
        "" if low > 0 else "; the interval contains 0" if high >= 0 else "; it rose"
    )


def _embedded(shown: Sequence[Shown]) -> list[EmbeddedImage]:
    return [EmbeddedImage(embedded_images.data_uri(opened_figure(one.path)), one.caption) for one in shown]


def _value(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _some(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
