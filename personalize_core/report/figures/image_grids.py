"""Grids of images as one PNG: each variant's images of each prompt."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, sqrt
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from personalize_core.files.atomic import write_bytes
from personalize_core.report.figures.images import ImageSource, square
from personalize_core.report.figures.style import GREY, INK, PALE

MOST_LINES = 8  # of a prompt over its column
MOST_HEADER = 1000  # characters that are looked at; a prompt from outside may have more


def comparison_grid(
    references: Sequence[ImageSource],
    rows: Mapping[str, Sequence[Sequence[ImageSource]]],
    columns: Sequence[str],
    path: str | Path,
    title: str = "",
    cell: int = 160,
    note: str = "",
) -> None:
    """Each variant's images of each prompt, beside the concept images that it learned from.

    Args:
        references: the concept's images; they stand on the left, over the whole height.
        rows: row label -> for each column the images of that prompt. Several share a cell; none leaves it empty.
        columns: the prompts, as shown.
        path: where the PNG goes.
        cell: pixels; the side of a cell. Cells with several images are larger.
        note: how the images are to be read; it stands below them.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """
    for label, cells in rows.items():
        if len(cells) != len(columns):
            raise ValueError(f"row {label!r} has {len(cells)} cells, but there are {len(columns)} prompts")
    most = max((len(cell) for cells in rows.values() for cell in cells), default=1)
    across = ceil(sqrt(max(most, 1)))
    tile = cell if across == 1 else round(cell * (0.8 if across == 2 else 0.6))
    inner, gap, margin = 4, 14, 24
    words = [word for label in rows for word in label.split()]
    label_width = max([122, *(ceil(font(15, bold=True).getlength(word)) for word in words)]) + 16
    wide, high = (count * tile + (count - 1) * inner for count in (across, ceil(max(most, 1) / across)))

    headers = [_header(text, wide) for text in columns]
    header = max([line_count(text) for text in headers] + [1]) * 19 + 10
    top = margin + (40 if title else 0)
    body = len(rows) * (high + gap) - gap
    of_references = Tiles.within(len(references), body, tile, gap if across == 1 else inner, most_wide=2 * tile + gap)
    left = margin + of_references.width + (28 if references else 0)
    width = left + label_width + len(columns) * (wide + gap) - gap + margin
    below = wrapped(note, font(13), width - 2 * margin)
    end = top + header + max(body, of_references.height)
    height = end + margin + (line_count(below) * 17 + 8 if note else 0)

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin - 4), title, font=font(20, bold=True), fill=INK)
    if references:
        draw.text((margin, top + header - 10), "the concept", font=font(14, bold=True), fill=INK, anchor="ld")
        for index, image in enumerate(references):
            x, y = of_references.place(index)
            sheet.paste(square(image, of_references.tile), (margin + x, top + header + y))
        x = left - 15
        draw.line((x, top + header, x, end), fill=PALE, width=2)

    for column, text in enumerate(headers):
        x = left + label_width + column * (wide + gap)
        draw.multiline_text((x, top + header - 10), text, font=font(14), fill=INK, anchor="ld", spacing=3)
    for number, (label, cells) in enumerate(rows.items()):
        y = top + header + number * (high + gap)
        text = wrapped(label, font(15, bold=True), label_width - 16)
        draw.multiline_text((left, y + high // 2), text, font=font(15, bold=True), fill=INK, anchor="lm", spacing=4)
        for column, images in enumerate(cells):
            x = left + label_width + column * (wide + gap)
            if not images:
                draw.rectangle((x, y, x + wide - 1, y + high - 1), outline=PALE, width=2)
                draw.text((x + wide // 2, y + high // 2), "no image", font=font(13), fill=GREY, anchor="mm")
            for index, image in enumerate(images):
                place = (x + index % across * (tile + inner), y + index // across * (tile + inner))
                sheet.paste(square(image, tile), place)
    draw.multiline_text((margin, end + 10), below, font=font(13), fill=GREY, spacing=3)
    save_png(sheet, path)


@dataclass(frozen=True)
class Tiles:
    """Square tiles of one size, filling columns from the top."""

    count: int
    rows: int
    tile: int  # pixels, as is the gap
    gap: int

    @classmethod
    def within(cls, count: int, height: int, tile: int, gap: int, most_wide: int) -> Tiles:
        """In as few and even columns as the height allows; smaller tiles where they would become too wide."""
        tiles = cls(count, 1, tile, gap)
        for share in (1, 0.75, 0.5, 0.4):
            side = round(share * tile)
            columns = max(1, ceil(count / max(1, (height + gap) // (side + gap))))
            tiles = cls(count, ceil(count / columns), side, gap)
            if tiles.width <= most_wide:
                break
        return tiles

    @property
    def width(self) -> int:
        columns = ceil(self.count / self.rows) if self.count else 0
        return max(0, columns * (self.tile + self.gap) - self.gap)

    @property
    def height(self) -> int:
        return max(0, self.rows * (self.tile + self.gap) - self.gap)

    def place(self, index: int) -> tuple[int, int]:
        column, row = divmod(index, self.rows)
        return column * (self.tile + self.gap), row * (self.tile + self.gap)


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib brings it along: the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    # the basic layout: the other one depends on whether libraqm is installed
    return ImageFont.truetype(
        Path(matplotlib.get_data_path(), "fonts", "ttf", name), size, layout_engine=ImageFont.Layout.BASIC
    )


def wrapped(text: str, used: ImageFont.FreeTypeFont, width: int) -> str:
    """The text with line breaks, so that no line is wider than `width` pixels unless one word is."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and used.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _header(text: str, width: int) -> str:
    """A prompt over its column: wrapped, cut where one word is wider than the column or there are too many lines."""
    lines = wrapped(text[:MOST_HEADER], font(14), width).split("\n")
    cut = len(text) > MOST_HEADER or len(lines) > MOST_LINES
    lines = [_fitting(line, width) for line in lines[:MOST_LINES]]
    return "\n".join(lines[:-1] + [_fitting(f"{lines[-1]} …", width) if cut else lines[-1]])


def _fitting(line: str, width: int) -> str:
    """The line, or its beginning with an ellipsis if the line is wider than `width` pixels."""
    if font(14).getlength(line) <= width:
        return line
    kept = line.removesuffix("…").rstrip()
    while kept and font(14).getlength(f"{kept}…") > width:
        kept = kept[:-1]
    return f"{kept}…"


def line_count(text: str) -> int:
    return text.count("\n") + 1


def save_png(image: Image.Image, path: str | Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(Path(path), buffer.getvalue())
