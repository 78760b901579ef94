"""Results of a study: shares with intervals, and how far the raters agree.

The procedure is that of Personalized Residuals (arXiv:2405.12978, sec. 4.3), as far as it is stated there: drop "not
sure", take the share that prefers the first variant, resample 10,000 times, give the central 95 % and n. Where a rater
answered several times, answers are not independent: raters are resampled, each with all of their answers (cluster
bootstrap), and that interval is the primary one. The intervals tell how far these raters settle the shares for these
images; other concepts and prompts are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import binomtest

from personalize_core.files.atomic import write_json
from personalize_core.metrics.parquet import write_parquet
from personalize_core.report.display_names import in_words
from personalize_core.study import answers as answer_files
from personalize_core.study.alpha import krippendorff_alpha
from personalize_core.study.answers import AnswerFile
from personalize_core.study.design import Key

NO_NOISE = "images made elsewhere share the prompt, not the noise"
DRAWS = 10_000
# In simulations with tastes that differ by rater, 95 % percentile intervals over 5, 10, 20 and 60 raters covered the
# truth in 86, 91, 92 and 94 % of 2,000 studies (6 answers each); below this many raters that is said.
FEW_RATERS = 20
ANSWERS, TABLE, SUMMARY = "study_answers.parquet", "study_results.parquet", "study_results.json"

COLUMNS: dict[str, tuple[pl.DataType, str]] = {
    "question": (pl.String(), answer_files.COLUMNS["question"][1]),
    "first": (pl.String(), "the variant whose share this is"),
    "second": (pl.String(), "the variant that it stood against"),
    "share": (pl.Float64(), "of the decided answers, the part that prefers `first`; null without a decided answer"),
    "low": (pl.Float64(), "lower end of the primary 95 % interval; null where there is none, see `note`"),
    "high": (pl.Float64(), "upper end of the primary 95 % interval"),
    "resampled": (pl.String(), "what the primary interval resamples: raters, or responses where each rater gave one"),
    "low_responses": (pl.Float64(), "lower end of the 95 % interval that takes answers for independent"),
    "high_responses": (pl.Float64(), "upper end of the same"),
    "verdict": (
        pl.String(),
        "first, second or undecided: by the primary interval at 1 - 0.05 / rows, for so many are looked at",
    ),
    "n": (pl.Int64(), "decided answers"),
    "not_sure": (pl.Int64(), "answers 'not sure', which are in no share"),
    "raters": (pl.Int64(), "raters with a decided answer"),
    "pairs": (pl.Int64(), "different pairs with a decided answer"),
    "alpha": (pl.Float64(), "Krippendorff's alpha (nominal) of the decided answers; null where there is none"),
    "alpha_pairs": (pl.Int64(), "pairs that two or more raters decided: what alpha rests on"),
    "note": (pl.String(), "why something is absent, or to be read with care; null where there is nothing to say"),
}
SCHEMA = pl.Schema({name: dtype for name, (dtype, _) in COLUMNS.items()})


@dataclass(frozen=True)
class Results:
    """All that is written and shown."""

    table: pl.DataFrame  # a row per question and comparison, as COLUMNS
    summary: dict[str, Any]

    @property
    def by_people(self) -> bool:
        return not self.summary["automated"]


def evaluate(key: Key, table: pl.DataFrame, files: Sequence[AnswerFile], draws: int = DRAWS, seed: int = 0) -> Results:
    """table, files: what answers.read returned."""
    asked = [(question, comparison) for question in key.questions for comparison in key.comparisons]
    rows = []
    for question, comparison in asked:
        own = table.filter(
            (pl.col("question") == question)
            & (pl.col("first") == comparison.first)
            & (pl.col("second") == comparison.second)
        )
        names = {"question": question, "first": comparison.first, "second": comparison.second}
        row = names | _row(own, len(asked), draws, seed)
        if {comparison.first, comparison.second} & set(key.made_elsewhere):
            row["note"] = "; ".join(filter(None, [row["note"], NO_NOISE]))
        rows.append(row)
    decided = table.filter(pl.col("preferred") != "not sure")
    finished = [file for file in files if len(file.answers) == file.questions]
    summary = {
        "study": key.study,
        "title": key.title,
        "what": "automatic stand-in: no person answered" if files[0].automated else "answers of people",
        "automated": files[0].automated,
        "base_model": key.base_model,
        "raters": len(files),
        "raters_who_finished": len(finished),
        "answers": len(table),
        "not_sure": len(table) - len(decided),
        "left_share_of_decided": _number((decided["answer"] == "left").mean()),
        "median_seconds_per_answer": _number(table["seconds"].median()),
        "agreement": {
            question: dict(zip(("alpha", "pairs"), agreement(decided.filter(question=question)), strict=True))
            for question in key.questions
        },
        "method": {
            "interval": f"95 % percentile bootstrap, {draws} draws, seed {seed}; 'not sure' dropped first",
            "verdict": f"the same interval at {100 * (1 - 0.05 / len(asked)):.6g} %: 5 % over {len(asked)} rows",
            "agreement": "Krippendorff's alpha, nominal, over pairs that two or more raters decided",
        },
        "rows": rows,
    }
    return Results(pl.DataFrame(rows, schema=SCHEMA), summary)


def write(results: Results, table: pl.DataFrame, folder: Path) -> list[Path]:
    """Every answer, the shares, and both again for programs; each file whole or not at all."""
    paths = [folder / ANSWERS, folder / TABLE, folder / SUMMARY]
    write_parquet(table, paths[0], {name: meaning for name, (_, meaning) in answer_files.COLUMNS.items()})
    write_parquet(results.table, paths[1], {name: meaning for name, (_, meaning) in COLUMNS.items()})
    write_json(paths[2], results.summary)
    return paths


def headline(results: Results) -> str:
    """What was counted, in words; answers by programs are never called a study."""
    s = results.summary
    left, seconds = s["left_share_of_decided"], s["median_seconds_per_answer"]
    people = f"{s['answers']} answers of {s['raters']} raters, {s['raters_who_finished']} of whom finished"
    lines = [
        f"Study {s['study']}: {people}"
        if results.by_people
        else f"Automatic stand-in on the page of {s['study']}, no human study: a program gave {s['answers']} answers",
        f"Left was chosen in {'-' if left is None else f'{left:.0%}'} of the decided answers; {seconds:.1f} s each",
    ]
    for question, found in s["agreement"].items():
        alpha = "-" if found["alpha"] is None else f"{found['alpha']:.2f}"
        lines.append(f"Agreement under {question!r}: Krippendorff's alpha {alpha}, over {found['pairs']} pairs")
    return "\n".join(lines)


def for_people(results: Results) -> list[list[str]]:
    """A heading, then a row per question and comparison."""
    rows = results.summary["rows"]
    words: dict[Any, str] = {"first": "for it", "second": "against it", "undecided": "undecided"}
    against = f"{in_words(rows[0]['first'])} against"
    lines = [["Question", against, "Prefer it [95 %]", "n", "Not sure", "Raters", "alpha", "Verdict"]]
    for row in rows:
        share = "-" if row["share"] is None else f"{row['share']:.3f}"
        if row["low"] is not None:
            share += f" [{row['low']:.3f}, {row['high']:.3f}]"
        alpha = "-" if row["alpha"] is None else f"{row['alpha']:.2f}"
        counts = [str(row[name]) for name in ("n", "not_sure", "raters")]
        lines.append([row["question"], in_words(row["second"]), share, *counts, alpha, words[row["verdict"]]])
    return lines


def notes(results: Results) -> list[str]:
    """What is to be known of single rows; what holds for several is said once."""
    of: dict[str, list[str]] = {}
    for row in results.summary["rows"]:
        for note in (row["note"] or "").split("; "):
            if note:
                of.setdefault(note, []).append(f"{row['question']}/{in_words(row['second'])}")
    everywhere = len(results.summary["rows"])
    return [note if len(where) == everywhere else f"{', '.join(where)}: {note}" for note, where in of.items()]


def _row(own: pl.DataFrame, looked_at: int, draws: int, seed: int) -> dict[str, Any]:
    """Everything about one question and comparison."""
    decided = own.filter(pl.col("preferred") != "not sure")
    per_rater = (
        decided.group_by("rater")
        .agg((pl.col("preferred") == "first").sum().alias("first"), pl.len().alias("n"))
        .sort("rater")
    )
    wins, n = per_rater["first"].to_numpy().astype(np.int64), per_rater["n"].to_numpy().astype(np.int64)
    share = float(wins.sum() / n.sum()) if len(n) else None
    clustered = bool((n > 1).any())
    singles = (decided.sort("rater", "order")["preferred"] == "first").to_numpy().astype(np.int64)
    responses = resampled_shares(singles, np.ones_like(singles), draws, seed) if len(singles) > 1 else None
    primary = responses
    if clustered:
        primary = resampled_shares(wins, n, draws, seed) if len(n) > 1 else None
    low, high = _ends(primary, 0.05)
    alpha, alpha_pairs = agreement(decided)
    verdict_low, verdict_high = _ends(primary, 0.05 / looked_at)
    verdict = "undecided"
    if verdict_low is not None and verdict_high is not None:
        verdict = "first" if verdict_low > 0.5 else "second" if verdict_high < 0.5 else verdict
    low_responses, high_responses = _ends(responses, 0.05)
    return {
        "share": share,
        "low": low,
        "high": high,
        "resampled": "raters" if clustered else "responses",
        "low_responses": low_responses,
        "high_responses": high_responses,
        "verdict": verdict,
        "n": len(decided),
        "not_sure": len(own) - len(decided),
        "raters": len(per_rater),
        "pairs": decided["pair"].n_unique(),
        "alpha": alpha,
        "alpha_pairs": alpha_pairs,
        "note": _note(share, low, len(decided), len(per_rater), alpha, alpha_pairs),
    }


def _note(
    share: float | None, low: float | None, n: int, raters: int, alpha: float | None, alpha_pairs: int
) -> str | None:
    if share is None:
        return "no decided answer"
    said = []
    if low is None and raters == 1:
        said.append("one rater: nothing to resample, no interval")
    elif low is None:
        exact = binomtest(round(share * n), n).proportion_ci(0.95)
        said.append(
            "all raters gave the same share: resampling shows no interval "
            f"(exact binomial, if answers were independent: {exact.low:.3f} to {exact.high:.3f})"
        )
    elif raters < FEW_RATERS:
        said.append(f"only {raters} raters: the interval tends to be too narrow")
    if alpha is None:
        said.append("all decided answers agree, alpha is undefined" if alpha_pairs else "no pair has two raters")
    return "; ".join(said) or None


def resampled_shares(wins: np.ndarray, n: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Shares over resampled clusters, (draws,).

    wins, n: (R,), of n answers of each cluster (a rater, or a single response) so many prefer the first variant;
    every n is at least 1.
    """
    generator = np.random.default_rng(seed)
    shares = np.empty(draws)
    rows = max(1, 2_000_000 // len(n))  # at most this many indices in memory at once
    for start in range(0, draws, rows):
        drawn = generator.integers(len(n), size=(min(rows, draws - start), len(n)))
        shares[start : start + len(drawn)] = wins[drawn].sum(axis=1) / n[drawn].sum(axis=1)
    return shares


def _ends(shares: np.ndarray | None, outside: float) -> tuple[float, float] | tuple[None, None]:
    """The central interval; none where every resample gave the same share, which is no sign of certainty."""
    if shares is None or np.ptp(shares) == 0:
        return None, None
    low, high = np.quantile(shares, [outside / 2, 1 - outside / 2])
    return float(low), float(high)


def agreement(decided: pl.DataFrame) -> tuple[float | None, int]:
    """Krippendorff's alpha over the answers to one question, and the number of pairs that it rests on."""
    codes = decided.select("pair", (pl.col("preferred") == "first").cast(pl.Int64).alias("first"))
    per_pair = codes.group_by("pair").agg(pl.col("first").sum(), pl.len().alias("n")).sort("pair")
    counts = np.stack([per_pair["first"].to_numpy(), (per_pair["n"] - per_pair["first"]).to_numpy()], axis=1)
    return krippendorff_alpha(counts), int((counts.sum(axis=1) > 1).sum())


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
