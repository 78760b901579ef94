"""Answers of a study and scores to a table: how well each metric predicts people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from personalize_core.concepts.concept import SLOT
from personalize_core.errors import InputError
from personalize_core.files.atomic import MANIFEST, is_up_to_date, write_json
from personalize_core.files.stamps import sources_hash, stamp_of
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.stamps.made import score_table_stamp
from personalize_core.workspace.store import AGREEMENT, SCORES, Store

if TYPE_CHECKING:
    import polars as pl

    from personalize_core.study.design import Key

SOURCES = (
    "metrics/tables",
    "report/figures",
    "steps/agreeing_with_people",
    "study/alpha",
    "study/answers",
    "study/metric_agreement",
)
FIGURE, ABOUT = "agreement.png", "agreement.json"


def study_agreement(
    store: Store, answers: Sequence[Path], key: Path | None = None, listener: Listener = unheard
) -> Report:
    """How well each metric and encoder predicts the answers of a study of this workspace's images.

    Args:
        answers: the files that raters saved, or folders of them.
        key: the study's key; by default the one beside the first answers.

    Raises:
        InputError: an answer or the key is damaged, or none of the images that raters saw has a score.
    """
    from personalize_core.files.outside import is_folder
    from personalize_core.metrics import tables
    from personalize_core.metrics.parquet import write_parquet
    from personalize_core.report.figures.agreement import agreement_plot
    from personalize_core.report.figures.style import save_figure
    from personalize_core.study import answers as answer_files
    from personalize_core.study import metric_agreement, page, results
    from personalize_core.study.design import Key, method_of

    started, folder = time.monotonic(), store.agreement()
    if not answers:
        raise InputError("no file of answers was given; name those that the study's page saved")
    beside = answers[0] if is_folder(answers[0]) else answers[0].parent
    read_key = Key.read(key or beside / page.KEY)
    given, files = answer_files.read(answer_files.among(answers, {page.KEY, results.SUMMARY, MANIFEST}), read_key)
    methods = method_of(store)
    variants = [read_key.comparisons[0].first, *(each.second for each in read_key.comparisons)]
    cells = sorted({(methods[name], one.name) for name in variants if name in methods for one in read_key.concepts})
    cells = [cell for cell in cells if (store.scores(*cell) / SCORES).is_file()]
    if not cells:
        raise InputError("no image of this study has been scored here; `personalize run` scores what was sampled")
    stamp = stamp_of(
        {
            "study": read_key.study,
            "answers": given.select("rater", "question", "pair", "preferred").to_dicts(),
            "scores": [score_table_stamp(store, concept, method) for method, concept in cells],
            "sources": sources_hash(SOURCES),
        }
    )
    with store.alone("agreement"):
        if not (skipped := is_up_to_date(folder, stamp)):
            listener(Event("comparing metrics with answers", 0, 1))
            nouns = {one.name: one.class_noun for one in read_key.concepts}
            scored = [_as_read(tables.read(store.scores(*cell) / SCORES), nouns[cell[1]]) for cell in cells]
            scores = metric_agreement.scores_of_pairs(pairs_of(read_key), scored)
            if scores.is_empty():
                raise InputError(
                    "the scores here are of other images than the raters saw; bring back the grids that the study was "
                    "made from, and score them with `personalize run`"
                )
            found = metric_agreement.agreement(given, scores)
            with making(store, folder, stamp) as new:
                meanings = {name: meaning for name, (_, meaning) in metric_agreement.COLUMNS.items()}
                write_parquet(found, new / AGREEMENT, meanings)
                save_figure(agreement_plot(found), new / FIGURE, also_svg=True)
                about = {"study": read_key.study, "title": read_key.title, "automated": files[0].automated}
                write_json(new / ABOUT, about | {"raters": len(files), "answers": len(given)})
            listener(Event("comparing metrics with answers", 1, 1))
    return Report(stamp, skipped, time.monotonic() - started, folder, {}, {"agreement": folder / FIGURE})


def _as_read(scores: pl.DataFrame, class_noun: str) -> pl.DataFrame:
    """A table of scores with each prompt as raters read it in `text`."""
    import polars as pl

    return scores.with_columns(pl.col("prompt").str.replace_all(SLOT, class_noun, literal=True).alias("text"))


def pairs_of(key: Key) -> pl.DataFrame:
    """Every pair of the study, as `metric_agreement.scores_of_pairs` takes them."""
    import polars as pl

    rows = []
    for number, images in enumerate(key.pairs()):
        one, other = (key.images[index] for index in images)
        cell = key.cells[one.cell]
        rows.append(
            {
                "pair": number,
                "concept": key.concepts[cell.concept].name,
                "text": cell.text,
                "first": one.variant,
                "second": other.variant,
                "first_sha256": one.sha256,
                "second_sha256": other.sha256,
            }
        )
    return pl.DataFrame(rows)
