"""The tables of scores: their columns and what those mean, how they are checked and joined, and on disk.

One row is one score of one image, so that every average can be taken later, and taken differently. A score that
could not be computed has no row. Every row says how it was measured, which is its contract: encoder, weights,
preprocessing, text, scaling, pairing and mask. Several encoders may stand beside each other in one table; tables that
were measured in different ways never join.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from personalize_core.errors import InputError, listed
from personalize_core.metrics.parquet import read_parquet, write_parquet

BASELINE = "base_model"  # the variant that learned nothing
CEILING = "real_images"  # method and variant of the rows that compare the real images with each other
ALL_CONCEPTS = "all concepts"  # in a summary; no concept can be called so, for names have no spaces

PLAIN, SCALED = "plain", "x2.5"  # scalings: the cosine itself, and CLIPScore's 2.5 * max(cosine, 0)
RATED = "0 to 4, divided by 4"  # and a judge's
RANGES = {PLAIN: (-1.0, 1.0), SCALED: (0.0, 2.5), RATED: (0.0, 1.0)}  # scaling -> the least and the greatest score
OWN_TEXT, ALL_PAIRS, OTHER_REAL = "own text", "all pairs G x R", "real images i != j"  # pairings
FIRST_OTHERS = "the first others"  # and a judge's: with the first of the references, itself left out
ALL_IMAGES, HELD_OUT, TRAINED_ON = "all concept images", "held out", "trained on"  # references
UNMASKED = "none"
SUBJECT_DELETED = "subject_deleted"  # MaSC's text variant
EMPTY = 0.01  # a mask of a smaller share of its image is empty: the concept is absent

TEXTS: dict[str, str] = {  # text variants: what stands in the prompt's slot
    "class_phrase": "the class noun in the slot",
    "slot_deleted": "the slot deleted, as Textual Inversion's evaluator does",
    "full_prompt": "the placeholder in the slot, which no encoder knows",
}


@dataclass(frozen=True)
class Measure:
    """What the name of a metric stands for, but for the encoder."""

    meaning: str
    text_variant: str | None = None  # of TEXTS; None: images are compared with images
    scaling: str = PLAIN
    masked: bool = False
    trained_on: bool = False  # compared with the images trained on, where others are held out
    judged: bool = False  # a model's answer, and no cosine

    @property
    def reads_text(self) -> bool:
        return self.text_variant is not None


def compared(metric: str, masked: bool, trained_on: bool) -> str:
    """The name under which a metric compares images with images: "dino", "dino_masked", "dino_trained_on"..."""
    return metric + "_masked" * masked + "_trained_on" * trained_on


def twin_of(metric: str) -> str:
    """The same metric with the other images, where some are held out: of "dino" "dino_trained_on", and back."""
    short = metric.removesuffix("_trained_on")
    return short if short != metric else compared(metric, False, True)


def shown(metric: str, there: Collection[str]) -> str:
    """The metric that stands for this one where `there` are measured: its twin, if no concept has images held out."""
    twin = twin_of(metric)
    return twin if metric not in there and twin in there else metric


def _measures() -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    for variant, words in TEXTS.items():
        name = "clip_t" if variant == "class_phrase" else f"clip_t_{variant}"
        found[name] = Measure(f"cosine of the image with its prompt, {words}, in [-1, 1]", variant)
        scaled = f"CLIPScore: 2.5 * max({name}, 0), in [0, 2.5]; as published near 0.7 to 0.8"
        found[f"{name}_scaled"] = Measure(scaled, variant, SCALED)
    for name, encoder in (("clip_i", "text-image"), ("dino", "identity")):
        for trained_on in (False, True):
            which = "concept images that were trained on, where others are held out" if trained_on else "concept images"
            words = f"mean cosine with the {which}, by the {encoder} encoder, in [-1, 1]"
            grey = f"{words}; all of them grey where they do not show the concept"
            found[compared(name, False, trained_on)] = Measure(words, trained_on=trained_on)
            found[compared(name, True, trained_on)] = Measure(grey, masked=True, trained_on=trained_on)
    for trained_on in (False, True):
        which = "concept images that were trained on, where others are held out" if trained_on else "concept images"
        found[compared("masc_cp", False, trained_on)] = Measure(
            "MaSC's concept preservation: the concept's patches in a concept image, each with its best match among all "
            f"patches of the image, mean cosine; mean over the {which}, in [-1, 1]",
            masked=True,
            trained_on=trained_on,
        )
    found["masc_pf"] = Measure(
        "MaSC's prompt following: cosine of the image's patches that do not show the concept, pooled, with the prompt "
        "without its subject, in [-1, 1]",
        SUBJECT_DELETED,
        masked=True,
    )
    judge = "by the answer of a vision-language model, which `encoder` names; 0 to 4, divided by 4, in [0, 1]"
    for trained_on in (False, True):
        which = "concept images that were trained on, where others are held out" if trained_on else "concept images"
        words = f"concept preservation beside the first of the {which}, {judge}"
        judged = Measure(words, scaling=RATED, trained_on=trained_on, judged=True)
        found[compared("judge_cp", False, trained_on)] = judged
    found["judge_pf"] = Measure(f"prompt following, {judge}", "class_phrase", RATED, judged=True)
    return found


MEASURES = _measures()
METRICS: dict[str, str] = {name: measure.meaning for name, measure in MEASURES.items()}


def range_of(metric: str, differences: int = 0) -> tuple[float, float]:
    """What a score can be; or a difference of two, or, for 2, of two differences."""
    low, high = RANGES[MEASURES[metric].scaling]
    for _ in range(differences):
        low, high = low - high, high - low
    return low, high


def contract_of(metric: str, method: str) -> dict[str, str | None]:
    """What a metric's name and the method say of the contract where nothing else is said.

    That is text_variant, scaling, pairing and references; UNMASKED if it is.
    """
    measure = MEASURES[metric]
    pairing = FIRST_OTHERS if measure.judged else OTHER_REAL if method == CEILING else ALL_PAIRS
    known = {"text_variant": measure.text_variant, "scaling": measure.scaling}
    known["pairing"] = OWN_TEXT if measure.reads_text else pairing
    known["references"] = None if measure.reads_text else TRAINED_ON if measure.trained_on else ALL_IMAGES
    return known if measure.masked else known | {"mask": UNMASKED}


def _contracts_of(metric: str, method: str) -> list[dict[str, str | None]]:
    """All that the contract of a row may be: two sets of real images are compared with each other, one within itself.

    The images held out and those trained on are such sets; what is compared with them, the metric's name says.
    """
    plain, measure = contract_of(metric, method), MEASURES[metric]
    if measure.reads_text:
        return [plain]
    if measure.judged:
        return [plain] if measure.trained_on else [plain, plain | {"references": HELD_OUT}]
    if measure.trained_on:
        return [plain] if method != CEILING else [plain, plain | {"pairing": ALL_PAIRS}]
    return [plain, plain | {"pairing": ALL_PAIRS, "references": HELD_OUT}]


@dataclass(frozen=True)
class Column:
    dtype: pl.DataType
    meaning: str
    nullable: bool = False


def text(meaning: str, nullable: bool = False) -> Column:
    return Column(pl.String(), meaning, nullable)


COLUMNS: dict[str, Column] = {
    "base_model": text(
        "name of the base model that the image was sampled from, or, where `source` says that it was made elsewhere, "
        "that it is compared with; null for a real image",
        nullable=True,
    ),
    "concept": text("name of the concept"),
    "method": text(
        f"how the concept was learned; {BASELINE!r} learned nothing, {CEILING!r} is no method; or the label of an "
        "external column, images that were made elsewhere"
    ),
    "variant": text("the method with its sampling options; a method's plain variant has the method's name"),
    "prompt_index": Column(pl.Int64(), "place in the prompt list, from 0; null for a real image", nullable=True),
    "prompt": text("the prompt template, with {} for the concept; null for a real image", nullable=True),
    "image_index": Column(
        pl.Int64(), "which image of this prompt, from 0; of images sampled here, equal indices share their first noise"
    ),
    "seed": Column(pl.UInt64(), "of an image made elsewhere, where it is known; else null", nullable=True),
    "source": text("what made an image that was made elsewhere; null for one sampled here", nullable=True),
    "image": text("path of the image, relative to the workspace, with '/'"),
    "image_sha256": text("sha256 of the image's file"),
    "metric": text("what was measured: " + "; ".join(f"{name}: {meaning}" for name, meaning in METRICS.items())),
    "encoder": text("the network whose features were compared; of a judge_ row, the model that was asked"),
    "encoder_sha256": text(
        "sha256 of that network's weights file; of a judge, what is known of its weights and where it was asked"
    ),
    "preprocessing": text("what happened to an image before that network saw it; of a judge, also how it was asked"),
    "text": text(
        "what a clip_t, masc_pf or judge_pf row compared the image with; null for the other metrics", nullable=True
    ),
    "text_variant": text(
        "how that text came of the prompt: "
        + "; ".join(f"{name}: {words}" for name, words in TEXTS.items())
        + f"; {SUBJECT_DELETED}: the class noun deleted with its article, as MaSC does"
        + "; or null",
        nullable=True,
    ),
    "scaling": text(f"{PLAIN}: the cosine itself; {SCALED}: CLIPScore, 2.5 * max(cosine, 0); {RATED}: a judge's"),
    "pairing": text(
        f"{OWN_TEXT}; {ALL_PAIRS}: with all references; {OTHER_REAL}: with all its others; {FIRST_OTHERS}: with the "
        "first of the references, as many as `pairs` says, and never with itself"
    ),
    "references": text(
        f"which concept images an image was compared with. {ALL_IMAGES}: none is held out, all are trained on; "
        f"{HELD_OUT}: those that are not trained on; {TRAINED_ON}: those that are, where others may be held out (of "
        "too few, none is); null: it was compared with a text",
        nullable=True,
    ),
    "mask": text(
        f"{UNMASKED}, or what of the image and the concept images was made grey or left out, and by which segmenter"
    ),
    "headline": Column(pl.Boolean(), "by the first encoder of its list, which rankings and figures show"),
    "pairs": Column(pl.Int64(), "how many cosines, or pairs of images that a judge saw, the score is the mean of"),
    "foreground": Column(
        pl.Float64(),
        f"share of the image that its mask leaves; below {EMPTY:g} the concept is absent and the image all grey "
        f"(but for MaSC), which stays in every mean; null where mask is {UNMASKED!r}",
        nullable=True,
    ),
    "score": Column(pl.Float64(), "the score; higher is more alike; never NaN"),
}
SCHEMA = pl.Schema({name: column.dtype for name, column in COLUMNS.items()})

CELL = ["concept", "prompt_index", "image_index"]  # one place in the grid, the same for every variant
CONTRACT = [  # all must agree before scores of one metric by one encoder may be compared
    "encoder_sha256", "preprocessing", "text_variant", "scaling", "references", "mask", "headline"
]  # fmt: skip
KEY = ["metric", "base_model", "method", "variant", *CELL]  # what makes a row the only one of its kind


# -- making and checking --------------------------------------------------------------------------------------


def from_rows(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """A checked table of rows that name every column; columns that may be null may be left out.

    So may those of the contract that follow from metric and method.
    """
    return checked(unchecked(rows))


def unchecked(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """A part of a table, of rows as `from_rows` takes them. `checked` wants all parts together."""
    rows = [
        contract_of(row["metric"], row.get("method", "")) | dict(row) if row.get("metric") in MEASURES else dict(row)
        for row in rows
    ]
    unknown = {name for row in rows for name in row} - set(COLUMNS)
    if unknown:
        raise ValueError(f"a row of scores has no column {sorted(unknown)[0]!r}; the columns are {listed(COLUMNS)}")
    return pl.DataFrame(rows, schema=SCHEMA, strict=True)


def checked(table: pl.DataFrame, where: str = "the table of scores") -> pl.DataFrame:
    """The same rows with columns and rows in their one order; equal tables become equal files.

    Raises:
        InputError: a column is missing, unknown or of another type, a value is null, NaN or no known metric,
            or two rows are about the same image and metric.
    """
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise InputError(f"{where} has no column {missing[0]!r}; score the images again to make it anew")
    if unknown := [name for name in table.columns if name not in COLUMNS]:
        raise InputError(f"{where} has a column {unknown[0]!r} that no table of scores has")
    for name, column in COLUMNS.items():
        if table.schema[name] != column.dtype:
            raise InputError(f"{where}: column {name!r} holds {table.schema[name]}, where {column.dtype} is expected")
        if not column.nullable and table[name].null_count():
            raise InputError(f"{where}: column {name!r} is empty in row {first(table[name].is_null())}")
    if (wrong := ~table["score"].is_finite()).any():
        row = table.row(first(wrong), named=True)
        raise InputError(
            f"{where}: the {row['metric']} of {row['image']} is {row['score']}; "
            "a score that cannot be computed must be left out"
        )
    if (wrong := ~table["metric"].is_in(list(METRICS))).any():
        raise InputError(f"{where}: no metric is called {table['metric'][first(wrong)]!r}; known are {listed(METRICS)}")
    _check_rows(table, where)
    unique = [*KEY, "encoder", *CONTRACT]
    table = table.select(list(COLUMNS)).sort(unique, nulls_last=False, maintain_order=True)
    if (twice := table.select(unique).is_duplicated()).any():
        row = table.row(first(twice), named=True)
        raise InputError(f"{where} has two {row['metric']} scores of {row['image']} by {row['encoder']!r}")
    return table


def _check_rows(table: pl.DataFrame, where: str) -> None:
    """Raise unless each row's contract is that of its metric, and its mask's share of the image is there, a share."""
    kinds = table.with_columns(
        pl.when(pl.col("method") == CEILING).then(pl.lit(CEILING)).otherwise(pl.lit("")).alias("method"),
        mask=pl.when(pl.col("mask") == UNMASKED).then(pl.col("mask")),
    ).select("metric", "method", "text_variant", "scaling", "pairing", "references", "mask")
    for row in kinds.unique(maintain_order=True).iter_rows(named=True):
        known = _contracts_of(row["metric"], row["method"])
        contract = next((one for one in known if one["references"] == row["references"]), known[0])
        if any(one["pairing"] == row["pairing"] and one["references"] == row["references"] for one in known):
            contract = contract | {"pairing": row["pairing"]}
        for column, expected in ({"mask": None} | contract).items():
            if row[column] != expected:
                if column == "mask":
                    expected = f"{UNMASKED!r}" if expected else "a rule"
                raise InputError(f"{where}: a row of {row['metric']} has {column} {row[column]!r}, not {expected}")
    masked, share = pl.col("mask") != UNMASKED, pl.col("foreground")
    wrong = table.select((share.is_not_null() != masked) | ~share.is_between(0, 1).fill_null(True)).to_series()
    if wrong.any():
        row = table.row(first(wrong), named=True)
        raise InputError(
            f"{where}: foreground of {row['image']} is {row['foreground']} under the mask {row['mask']!r}; it must be "
            "a share from 0 to 1 where there is a mask, and empty where there is none"
        )
    if (wrong := table["pairs"] < 1).any():
        raise InputError(f"{where}: pairs is {table['pairs'][first(wrong)]} in row {first(wrong)}; it must be positive")


def groups(table: pl.DataFrame, by: list[str]) -> Iterator[tuple[dict[str, Any], pl.DataFrame]]:
    for key, group in table.group_by(by, maintain_order=True):
        yield dict(zip(by, key, strict=True)), group


def first(mask: pl.Series) -> int:
    return int(mask.arg_true()[0])


def concatenate(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """All rows together; a row that several tables share (each may carry the baseline's) stands there once.

    Raises:
        InputError: one metric was measured in different ways (the message says in what they differ), or two tables give
            different scores to the same image.
    """
    if not tables:
        raise ValueError("there are no tables of scores to join")
    together = checked(pl.concat([checked(table) for table in tables]).unique(), "the joined table of scores")
    check_contract(together)
    return together


def check_contract(table: pl.DataFrame) -> None:
    """Raise unless each metric was measured in one way throughout, and say where two ways part.

    One way is: the same encoders wherever the metric is there at all, and one contract for each of them.
    """
    for metric in table["metric"].unique(maintain_order=True):
        rows = table.filter(pl.col("metric") == metric)
        groups_of = rows.group_by("method", "concept", maintain_order=True)
        sets = groups_of.agg(pl.col("encoder").unique().sort(), pl.col("image").first())
        for other in sets.iter_rows(named=True):
            if other["encoder"] != sets["encoder"][0].to_list():
                one = sets.row(0, named=True)
                parts = [f"encoder {listed(map(repr, one['encoder']))} and {listed(map(repr, other['encoder']))}"]
                _refuse(metric, parts, [one["image"], other["image"]])
        ways = rows.group_by("encoder", *CONTRACT, maintain_order=True).agg(pl.col("image").first())
        for _, of_one in groups(ways, ["encoder"]):
            if len(of_one) > 1:
                one, other = of_one.row(0, named=True), of_one.row(1, named=True)
                differ = [column for column in CONTRACT if one[column] != other[column]]
                parts = [f"{name} {short(one[name])!r} and {short(other[name])!r}" for name in differ]
                _refuse(metric, parts, [one["image"], other["image"]])
        if rows.select(pl.col("encoder").filter("headline").n_unique()).item() != 1:
            raise InputError(f"one encoder of {metric} must be the headline, and only one; score the images again")


def _refuse(metric: str, parts: Sequence[str], examples: Sequence[str]) -> None:
    raise InputError(
        f"these tables cannot be joined, for their {metric} was measured in different ways: {listed(parts)} "
        f"(for example {listed(examples)}); score all of them again with the same encoders"
    )


def short(value: Any) -> Any:
    """A sha256 as its first 12 digits, enough to tell two apart; anything else whole."""
    return value[:12] if isinstance(value, str) and len(value) == 64 and " " not in value else value


# -- on disk --------------------------------------------------------------------------------------------------


def write(table: pl.DataFrame, path: str | Path) -> None:
    """Check and write a table of scores, whole or not at all. Equal tables give the same bytes."""
    table = checked(table, "the table of scores to be written")
    write_parquet(table, path, {name: column.meaning for name, column in COLUMNS.items()})


def read(path: str | Path) -> pl.DataFrame:
    """A table of scores that `write` wrote, checked.

    Raises:
        InputError: there is no such file, or it is no table of scores.
    """
    return checked(read_parquet(path), str(path))


def means(table: pl.DataFrame) -> dict[str, float]:
    """Mean of each metric over a table's images by its headline encoder, for reports; variants are told apart."""
    table = table.filter("headline")
    several = table["variant"].n_unique() > 1
    return {
        f"{variant}.{metric}" if several else metric: float(group["score"].to_numpy().mean())
        for (variant, metric), group in table.group_by("variant", "metric", maintain_order=True)
    }
