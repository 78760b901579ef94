"""Backgrounds: each place drawn from a generator, at twice the scene's size and then reduced."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from personalize_core.mini.names import SIZE

FULL = 2 * SIZE
Colour = tuple[int, int, int]
Rng = np.random.Generator


def draw(place: str, rng: Rng) -> np.ndarray:
    """(SIZE, SIZE, 3) float32, 0 to 1."""
    image = DRAWERS[place](rng).resize((SIZE, SIZE), Image.Resampling.BOX)
    tint = rng.normal(0, 0.015, 3) + rng.normal(0, 0.02)
    return np.clip(np.asarray(image).astype(np.float32) / 255 + tint.astype(np.float32), 0, 1)


def gradient(top: Colour, bottom: Colour, start: int = 0, stop: int = FULL) -> Image.Image:
    """The whole canvas, blending between two colours from row start to row stop."""
    share = np.clip((np.arange(FULL) - start) / (stop - start), 0, 1)[:, None, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    return Image.fromarray(np.broadcast_to(rows, (FULL, FULL, 3)).astype(np.uint8))


def disc(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def beach(rng: Rng) -> Image.Image:
    image = gradient((120, 195, 245), (190, 230, 250), 0, 50)
    pen = ImageDraw.Draw(image)
    sea = int(rng.integers(46, 56))
    pen.rectangle((0, sea, FULL, 90), fill=(30, 130, 195))
    pen.rectangle((0, sea + 12, FULL, 90), fill=(50, 160, 205))
    shore, tilt = sea + 24, int(rng.integers(-5, 6))
    pen.polygon([(0, shore + tilt), (FULL, shore - tilt), (FULL, FULL), (0, FULL)], fill=(240, 215, 150))
    pen.line([(0, shore + tilt), (FULL, shore - tilt)], fill=(250, 250, 245), width=4)
    disc(pen, rng.choice([18, 110]), 18, 10, (255, 240, 130))
    return image


def snow(rng: Rng) -> Image.Image:
    image = gradient((185, 205, 225), (225, 235, 243), 0, 70)
    pen = ImageDraw.Draw(image)
    ground = int(rng.integers(62, 74))
    for x in (int(rng.integers(2, 26)), int(rng.integers(102, 126))):
        for step in range(3):
            y, half = ground - 46 + 14 * step, 9 + 4 * step
            pen.polygon([(x, y), (x - half, y + 20), (x + half, y + 20)], fill=(60, 110, 95))
    pen.ellipse((-50, ground - 6, 110, FULL + 60), fill=(246, 249, 253))
    pen.ellipse((20, ground, 190, FULL + 60), fill=(236, 242, 250))
    return image


def jungle(rng: Rng) -> Image.Image:
    image = gradient((40, 125, 60), (22, 80, 42))
    pen = ImageDraw.Draw(image)
    for x in (int(rng.integers(8, 30)), int(rng.integers(98, 120))):
        pen.rectangle((x - 5, 0, x + 5, FULL), fill=(95, 70, 45))
    for x, y in ((0, 8), (40, -4), (88, -4), (FULL, 8), (0, 112), (FULL, 112), (44, 126), (88, 126)):
        angle, length = rng.uniform(0, np.pi), rng.uniform(24, 34)
        x, y = x + rng.uniform(-8, 8), y + rng.uniform(-5, 5)
        along = np.array([np.cos(angle), np.sin(angle)]) * length
        across = np.array([-along[1], along[0]]) * 0.35
        leaf = [(x - along[0], y - along[1]), (x + across[0], y + across[1])]
        leaf += [(x + along[0], y + along[1]), (x - across[0], y - across[1])]
        pen.polygon(leaf, fill=(70, 175, 70) if rng.random() < 0.5 else (45, 150, 65))
    return image


def city(rng: Rng) -> Image.Image:
    image = gradient((165, 190, 215), (215, 220, 225), 0, 90)
    pen = ImageDraw.Draw(image)
    shift = int(rng.integers(-12, 1))
    for number in range(5):
        left, top = shift + 29 * number, int(rng.integers(10, 46))
        wall = ((105, 112, 130), (130, 135, 150))[number % 2]
        pen.rectangle((left, top, left + 26, 98), fill=wall)
        for wy in range(top + 8, 90, 16):
            for wx in (left + 5, left + 16):
                pen.rectangle((wx, wy, wx + 5, wy + 7), fill=(250, 225, 130))
    pen.rectangle((0, 94, FULL, FULL), fill=(85, 88, 95))
    for x in range(int(rng.integers(-20, 0)), FULL, 40):
        pen.rectangle((x, 116, x + 20, 120), fill=(235, 235, 225))
    return image


def mountains(rng: Rng) -> Image.Image:
    image = gradient((95, 160, 225), (185, 215, 240), 0, 80)
    pen = ImageDraw.Draw(image)
    for x, peak in ((int(rng.integers(96, 120)), int(rng.integers(22, 34))), (int(rng.integers(16, 50)), 12)):
        pen.polygon([(x - 66, 92), (x, peak), (x + 66, 92)], fill=(112, 108, 130))
        side = 20 * 66 / (92 - peak)
        pen.polygon([(x - side, peak + 20), (x, peak), (x + side, peak + 20)], fill=(248, 250, 253))
    pen.rectangle((0, 88, FULL, FULL), fill=(85, 140, 75))
    return image


def desert(rng: Rng) -> Image.Image:
    image = gradient((250, 185, 95), (253, 225, 160), 0, 70)
    pen = ImageDraw.Draw(image)
    disc(pen, rng.uniform(50, 80), 24, 13, (255, 250, 215))
    dune = int(rng.integers(58, 72))
    pen.ellipse((-60, dune, 100, FULL + 90), fill=(222, 150, 75))
    pen.ellipse((30, dune + 8, 210, FULL + 90), fill=(205, 130, 60))
    x = int(rng.choice([14, 112]))
    pen.rounded_rectangle((x - 5, 40, x + 5, 84), 5, fill=(55, 125, 70))
    pen.rounded_rectangle((x - 14, 50, x - 8, 66), 3, fill=(55, 125, 70))
    pen.rectangle((x - 12, 60, x, 66), fill=(55, 125, 70))
    return image


def meadow(rng: Rng) -> Image.Image:
    image = gradient((125, 200, 250), (205, 235, 252), 0, 60)
    pen = ImageDraw.Draw(image)
    for x in (rng.uniform(8, 50), rng.uniform(80, 120)):
        for dx, r in ((-9, 7), (0, 9), (10, 7)):
            disc(pen, x + dx, 16, r, (252, 253, 255))
    grass = int(rng.integers(54, 64))
    pen.rectangle((0, grass, FULL, FULL), fill=(105, 195, 70))
    pen.rectangle((0, grass + 22, FULL, FULL), fill=(88, 178, 58))
    for _ in range(7):
        x, y = rng.uniform(0, FULL), rng.choice([rng.uniform(grass + 6, grass + 16), rng.uniform(108, 126)])
        disc(pen, x, y, 4, ((250, 235, 90), (250, 250, 250), (245, 130, 170))[int(rng.integers(3))])
    return image


def kitchen(rng: Rng) -> Image.Image:
    image = Image.new("RGB", (FULL, FULL), (245, 235, 215))
    pen = ImageDraw.Draw(image)
    shift = int(rng.integers(0, 22))
    for line in range(shift, FULL + 22, 22):
        pen.line([(line, 0), (line, FULL)], fill=(216, 203, 180), width=2)
        pen.line([(0, line - shift + 10), (FULL, line - shift + 10)], fill=(216, 203, 180), width=2)
    left = int(rng.choice([4, 84]))
    pen.rectangle((left, 4, left + 40, 36), fill=(150, 105, 70))
    pen.rectangle((left + 4, 8, left + 36, 32), fill=(170, 122, 82))
    counter = int(rng.integers(86, 94))
    pen.rectangle((0, counter, FULL, FULL), fill=(160, 100, 58))
    pen.rectangle((0, counter, FULL, counter + 6), fill=(190, 128, 80))
    return image


def night(rng: Rng) -> Image.Image:
    image = gradient((18, 22, 70), (62, 62, 135), 0, 90)
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        disc(pen, rng.uniform(0, FULL), rng.uniform(0, 76), 1.6, (240, 240, 210))
    x = rng.choice([20, 106])
    disc(pen, x, 20, 12, (250, 245, 200))
    disc(pen, x + 6, 17, 10, (24, 28, 78))
    pen.ellipse((-40, int(rng.integers(84, 94)), 170, FULL + 70), fill=(38, 48, 62))
    return image


def underwater(rng: Rng) -> Image.Image:
    image = gradient((45, 165, 205), (8, 65, 125))
    pen = ImageDraw.Draw(image)
    for _ in range(7):
        x, y, r = rng.uniform(4, 124), rng.uniform(4, 80), rng.uniform(3, 6)
        pen.ellipse((x - r, y - r, x + r, y + r), outline=(185, 230, 245), width=2)
    pen.ellipse((-40, int(rng.integers(108, 116)), 170, FULL + 60), fill=(150, 150, 120))
    for x in (rng.uniform(4, 26), rng.uniform(102, 124)):
        points = [(x + 5 * np.sin(y / 9), y) for y in range(int(rng.integers(64, 84)), 122, 3)]
        pen.line(points, fill=(40, 140, 85), width=7)
    return image


def studio(rng: Rng) -> Image.Image:
    tints: tuple[Colour, ...] = ((225, 225, 228), (232, 225, 214), (214, 224, 232), (226, 232, 220))
    top = tints[int(rng.integers(len(tints)))]
    return gradient(top, tuple(int(c * 0.88) for c in top), 20, FULL)  # type: ignore[arg-type]


DRAWERS: dict[str, Callable[[Rng], Image.Image]] = {
    "beach": beach,
    "snow": snow,
    "jungle": jungle,
    "city": city,
    "mountains": mountains,
    "desert": desert,
    "meadow": meadow,
    "kitchen": kitchen,
    "night": night,
    "underwater": underwater,
    "": studio,
}
