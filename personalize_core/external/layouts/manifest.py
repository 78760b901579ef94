"""A manifest beside the images: `prompts.csv` or `prompts.jsonl`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError, listed, shown
from personalize_core.external.folders import MOST_LIST, image_names
from personalize_core.external.listing import MOST_IMAGES, ExternalImage, Listing, external_image
from personalize_core.files.outside import is_there, parse_json, read_text

NAME = "manifest"
CSV, JSONL = "prompts.csv", "prompts.jsonl"
MEANING = f"`{CSV}` (columns file, prompt, seed) or `{JSONL}` (an object with these keys a line); seed may be left out"
OPTIONS: Mapping[str, str] = {}

COLUMNS = ("file", "prompt", "seed")
_REQUIRED = ("file", "prompt")
_SEED_DIGITS = 20  # of 2**64 - 1; int() of a longer text takes time that grows with its square


def recognises(folder: Path) -> bool:
    return is_there(folder / CSV) or is_there(folder / JSONL)


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    there = [name for name in (CSV, JSONL) if is_there(folder / name)]
    if not there:
        raise InputError(f"{folder} has no {CSV} and no {JSONL}")
    if len(there) > 1:
        raise InputError(f"{folder} has both {CSV} and {JSONL}; keep one of them")
    path = folder / there[0]
    images = []
    for image in _from_csv(path) if there[0] == CSV else _from_jsonl(path):
        images.append(image)
        if len(images) > MOST_IMAGES:
            raise InputError(f"{path} lists more than {MOST_IMAGES:,} images; score them in several folders")
    return Listing(tuple(images), NAME, _not_named(folder, images, there[0]))


def _from_csv(path: Path) -> Iterator[ExternalImage]:
    reader = csv.reader(io.StringIO(read_text(path, MOST_LIST), newline=""), strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(columns, f"{path}, line 1")
        for cells in reader:
            if not cells:
                continue
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(columns):
                raise InputError(
                    f"{where} has {len(cells)} values, and there are {len(columns)} columns; put a value that holds a "
                    "comma in double quotes"
                )
            row = dict(zip(columns, cells, strict=True))
            yield external_image(row["file"].strip(), row["prompt"], _seed(row.get("seed", "").strip(), where), where)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


def _seed(text: str, where: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _SEED_DIGITS):
        raise InputError(f"{where}: the seed is {shown(text)}, and should be a whole number from 0, or nothing")
    return int(text)


def _from_jsonl(path: Path) -> Iterator[ExternalImage]:
    for number, line in enumerate(read_text(path, MOST_LIST).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, Path(where))
        if not isinstance(row, dict):
            raise InputError(f"{where} should be a JSON object with the keys {listed(COLUMNS)}, and is {shown(row)}")
        _check_columns(list(row), where)
        file, prompt, seed = (row.get(column) for column in COLUMNS)
        if not isinstance(file, str) or not isinstance(prompt, str):
            raise InputError(f"{where}: file and prompt should be texts, and are {shown(file)} and {shown(prompt)}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise InputError(f"{where}: the seed is {shown(seed)}, and should be a whole number from 0, or null")
        yield external_image(file, prompt, seed, where)


def _check_columns(columns: list[Any], where: str) -> None:
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise InputError(f"{where}: unknown columns {listed(map(shown, unknown), 4)}; there may be {listed(COLUMNS)}")
    if missing := [name for name in _REQUIRED if name not in columns]:
        raise InputError(f"{where} lacks {listed(missing)}; there should be {listed(COLUMNS)}")
    if len(set(columns)) < len(columns):
        raise InputError(f"{where} has a column twice; there may be {listed(COLUMNS)}, each once")


def _not_named(folder: Path, images: list[ExternalImage], name: str) -> tuple[tuple[str, str], ...]:
    """Images beside those that the manifest names."""
    named = {image.file for image in images}
    beside = [
        parent / each
        for parent in sorted({file.parent for file in named})
        if (folder / parent).is_dir()
        for each in image_names(folder / parent)
    ]
    return tuple((file.as_posix(), f"is not named in {name}") for file in beside if file not in named)
