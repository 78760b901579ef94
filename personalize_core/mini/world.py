"""The mini world: a scene is one painted thing, or two, on one place in one style, its caption, and their mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from personalize_core.mini import places, sprites
from personalize_core.mini.names import (
    ALL_COLOURS,
    CATEGORIES,
    COLOURS,
    DESIGNS,
    MARKS,
    PLACES,
    SIZE,
    STYLE_TEMPLATES,
    STYLES,
    VARIANTS,
)

Rng = np.random.Generator
MARGIN = 6  # pixels around a sprite, room for its outline
SOFTNESS = 0.5  # pixels, deviation of the blur: a camera's, and detail that an autoencoder of 16 x 16 x 4 cannot keep


@dataclass(frozen=True)
class Design:
    """How a thing is painted; two things with the same sprite and design are the same thing."""

    sprite: str
    colours: tuple[str, str]  # the second is unused where the design is plain
    layout: str = "plain"  # one of DESIGNS
    mark: str | None = None  # one of MARKS
    mark_colour: str = "white"
    shape: tuple[float, float, float] = (0.0, 0.0, 0.0)  # how the sprite is bent, see `shaped`


@dataclass(frozen=True)
class Pose:
    size: float  # the longer side, as a share of the image
    x: float  # centre, pixels
    y: float
    angle: float  # degrees, counter-clockwise
    flipped: bool


@dataclass(frozen=True)
class Thing:
    category: str
    design: Design
    pose: Pose


@dataclass(frozen=True)
class Scene(Thing):
    place: str  # one of PLACES
    style: str  # one of STYLES
    place_seed: int
    beside: Thing | None = None  # a second thing, to the right of the first

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self,) if self.beside is None else (self, self.beside)


def random_pose(rng: Rng) -> Pose:
    size = rng.uniform(0.62, 0.80)
    return Pose(
        size, SIZE / 2 + rng.uniform(-5, 5), SIZE * 0.54 + rng.uniform(-3, 4), rng.uniform(-9, 9), rng.random() < 0.5
    )


def random_design(rng: Rng, sprite: str, plain: float = 0.8) -> Design:
    """With probability `plain` one colour that a caption can name, else two colours and a mark."""
    if rng.random() < plain:
        colour = str(rng.choice(list(COLOURS)))
        return Design(sprite, (colour, colour))
    first, second, third = (str(c) for c in rng.choice(list(ALL_COLOURS), 3, replace=False))
    mark = str(rng.choice(MARKS)) if rng.random() < 0.7 else None
    return Design(sprite, (first, second), str(rng.choice(DESIGNS[1:])), mark, third)


def random_scene(rng: Rng, plain: float = 0.8, photo: float = 0.8, studio: float = 0.18) -> Scene:
    category = str(rng.choice(CATEGORIES))
    design = random_design(rng, str(rng.choice(VARIANTS[category])), plain)
    place = "" if rng.random() < studio else str(rng.choice([p for p in PLACES if p]))
    style = "photo" if rng.random() < photo else str(rng.choice(STYLES[1:]))
    return Scene(category, design, random_pose(rng), place, style, int(rng.integers(2**31)))


def random_pair(rng: Rng, **odds: float) -> Scene:
    """Two things of different categories side by side, each about half as wide as the image."""
    scene = random_scene(rng, **odds)
    category = str(rng.choice([c for c in CATEGORIES if c != scene.category]))
    design = random_design(rng, str(rng.choice(VARIANTS[category])), odds.get("plain", 0.8))
    left, right = (half_as_wide(rng, middle) for middle in (0.26, 0.74))
    return replace(scene, pose=left, beside=Thing(category, design, right))


def half_as_wide(rng: Rng, middle: float) -> Pose:
    """Of a thing that takes about half of the image's width, around `middle` (0 to 1) of it."""
    size, x = rng.uniform(0.40, 0.47), SIZE * middle + rng.uniform(-2, 2)
    return replace(random_pose(rng), size=size, x=x)


def colour_words(design: Design) -> str:
    return design.colours[0] if design.layout == "plain" else f"{design.colours[0]} and {design.colours[1]}"


def caption(scene: Scene, rng: Rng | None = None, names: Sequence[str | None] | None = None) -> str:
    """With a generator: a template drawn at random, colours and place left out now and then. Without: all of it.

    Args:
        names: for each thing of the scene what is said instead of its colours and category; None says these.
    """
    template, place = STYLE_TEMPLATES[scene.style][0], PLACES[scene.place]
    if rng is not None and rng.random() < 0.3:
        template = str(rng.choice(STYLE_TEMPLATES[scene.style]))
    named = []
    for thing, name in zip(scene.things, names or (None,) * len(scene.things), strict=True):
        if name is not None:
            named.append(name)
            continue
        silent = scene.style == "sketch" or (rng is not None and rng.random() < 0.25)  # a sketch is grey
        named.append(f"{'' if silent else colour_words(thing.design)} {thing.category}".strip())
    place = "" if rng is not None and rng.random() < 0.10 else place
    return " ".join(f"{template.format(' next to a '.join(named))} {place}".split())


def draw(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The image, (SIZE, SIZE, 3) uint8, and the mask of all its things, (SIZE, SIZE) uint8, 0 or 255."""
    image = places.draw(scene.place, np.random.default_rng(scene.place_seed))
    masks = []
    for thing in scene.things:
        image, alpha = placed(image, thing)
        masks.append(alpha)
    mask = (np.maximum.reduce(masks) > 0.5) * 255
    return (softened(styled(image, scene.style)) * 255).round().astype(np.uint8), mask.astype(np.uint8)


def placed(image: np.ndarray, thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """The thing and its shadow on the image, (SIZE, SIZE, 3) float32, 0 to 1; and the thing's alpha (SIZE, SIZE)."""
    layer = posed(painted(thing.design), thing.pose)
    alpha = layer[..., 3:]
    return shadowed(image, alpha[..., 0]) * (1 - alpha) + layer[..., :3] * alpha, alpha[..., 0]


def softened(image: np.ndarray) -> np.ndarray:
    """A Gaussian blur of SOFTNESS, three taps each way; the border repeats itself."""
    beside = np.exp(-0.5 / SOFTNESS**2)
    middle, beside = 1 / (1 + 2 * beside), beside / (1 + 2 * beside)
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        before, after = np.take(padded, range(SIZE), axis), np.take(padded, range(2, SIZE + 2), axis)
        image = middle * image + beside * (before + after)
    return image


def painted(design: Design) -> Image.Image:
    """The sprite in its colours, outlined, with MARGIN pixels around it: RGBA."""
    shade, alpha = (shaped(grid, design.shape) for grid in sprites.load(design.sprite))
    first, second = (np.array(ALL_COLOURS[c], np.float32) / 255 for c in design.colours)
    body = np.where(region(design.layout, *shade.shape)[..., None], second, first)
    dark = np.clip(-shade, 0, 1)[..., None] ** 1.2 * 0.85
    light = np.clip(shade, 0, 1)[..., None] ** 1.2 * 0.75
    if design.mark:
        ink = stamped(design.mark, alpha)[..., None]
        body = body + ink * (np.array(ALL_COLOURS[design.mark_colour], np.float32) / 255 - body)
        light = light * (1 - 0.85 * ink)  # or a mark on a light face would be as light as the face
    colour = body * (1 - dark) * (1 - light) + light * (1 - dark)
    outline = Image.fromarray((np.pad(alpha, MARGIN) * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(5))
    rgb = np.pad(colour, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    inside = np.pad(alpha, MARGIN)[..., None]
    edge = first * 0.3 if first.mean() > 0.3 else first * 0.3 + 0.55  # a black thing has a light edge
    rgb = rgb * inside + edge * (1 - inside)
    return Image.merge("RGBA", [*Image.fromarray((rgb * 255).astype(np.uint8)).split(), outline])


def shaped(grid: np.ndarray, shape: tuple[float, float, float]) -> np.ndarray:
    """A sprite's shade or alpha, (h, w) float32, bent: (h', w') float32, 0 where the sprite does not reach.

    Args:
        shape: the logarithm of how much wider it becomes for its height; by how much narrower its top is than its
            foot, or its foot than its top if negative, as a share of the width; by how much its top leans to the right
            of its foot, likewise.
    """
    if not any(shape):
        return grid
    wider, taper, lean = shape
    width, height = grid.shape[1] * np.exp(wider / 2), round(grid.shape[0] * np.exp(-wider / 2))
    canvas = round(width * (1 + abs(lean)))
    corners = []
    for side, row, narrower in ((0, 0, taper), (0, 1, -taper), (canvas, 1, -taper), (canvas, 0, taper)):
        across = width * (1 - max(narrower, 0))
        left = canvas / 2 + lean * width * (0.5 - row) - across / 2
        corners += [(side - left) / across * grid.shape[1], row * grid.shape[0]]
    image = Image.fromarray(grid.astype(np.float32))
    bent = image.transform((canvas, height), Image.Transform.QUAD, corners, Image.Resampling.BILINEAR)
    return np.asarray(bent).copy()


def region(layout: str, height: int, width: int) -> np.ndarray:
    """(height, width) bool: where the second colour goes."""
    y, x = np.mgrid[0:height, 0:width]
    if layout == "halves":
        return y > height * 0.52
    if layout == "sides":
        return x > width * 0.5
    if layout == "diagonal":
        return x / width + y / height > 1
    if layout == "stripes":
        return (y * 5 // height) % 2 == 1
    return np.zeros((height, width), bool)


def stamped(mark: str, alpha: np.ndarray) -> np.ndarray:
    """(h, w) float32, 0 to 1: the mark, on the middle of what the alpha outlines."""
    weight = alpha / alpha.sum()
    y, x = (float((grid * weight).sum()) for grid in np.mgrid[0 : alpha.shape[0], 0 : alpha.shape[1]])
    stencil = Image.new("L", (alpha.shape[1] * 2, alpha.shape[0] * 2))
    draw_mark(ImageDraw.Draw(stencil), mark, 2 * x, 2 * y, 2 * 14)
    return np.asarray(stencil.resize((alpha.shape[1], alpha.shape[0]), Image.Resampling.BOX)).astype(np.float32) / 255


def draw_mark(pen: ImageDraw.ImageDraw, mark: str, x: float, y: float, r: float) -> None:
    if mark == "star":
        angles = -np.pi / 2 + np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, r, r * 0.45)
        pen.polygon([(x + q * np.cos(a), y + q * np.sin(a)) for a, q in zip(angles, radii, strict=True)], fill=255)
    elif mark == "heart":
        t = np.linspace(0, 2 * np.pi, 40)
        heart_x = 16 * np.sin(t) ** 3
        heart_y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        pen.polygon([(x + a * r / 16, y - b * r / 16) for a, b in zip(heart_x, heart_y, strict=True)], fill=255)
    elif mark == "disc":
        pen.ellipse((x - r * 0.8, y - r * 0.8, x + r * 0.8, y + r * 0.8), fill=255)
    elif mark == "ring":
        pen.ellipse((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), outline=255, width=int(r * 0.4))
    elif mark == "cross":
        pen.rectangle((x - r * 0.9, y - r * 0.3, x + r * 0.9, y + r * 0.3), fill=255)
        pen.rectangle((x - r * 0.3, y - r * 0.9, x + r * 0.3, y + r * 0.9), fill=255)
    elif mark == "bolt":
        shape = ((0.2, -1), (-0.6, 0.2), (-0.05, 0.2), (-0.25, 1), (0.6, -0.3), (0.05, -0.3))
        pen.polygon([(x + a * r, y + b * r) for a, b in shape], fill=255)


def posed(sprite: Image.Image, pose: Pose) -> np.ndarray:
    """The sprite turned, scaled and set on an empty image: (SIZE, SIZE, 4) float32, 0 to 1."""
    if pose.flipped:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = pose.size * SIZE / (max(sprite.size) - 2 * MARGIN)
    turned = sprite.convert("RGBa").rotate(pose.angle, Image.Resampling.BICUBIC, expand=True)
    turned = turned.resize((round(turned.width * scale), round(turned.height * scale)), Image.Resampling.BOX)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(turned.convert("RGBA"), (round(pose.x - turned.width / 2), round(pose.y - turned.height / 2)))
    return np.asarray(canvas).astype(np.float32) / 255


def shadowed(ground: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The ground with a soft shadow under the thing."""
    columns, rows = (np.flatnonzero(alpha.max(axis) > 0.5) for axis in (0, 1))
    if not len(columns):
        return ground
    left, right, foot = columns[0], columns[-1], rows[-1]
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    distance = ((x - (left + right) / 2) / ((right - left) * 0.55)) ** 2 + ((y - foot) / 3.5) ** 2
    return ground * (1 - 0.45 * np.clip(1.3 - distance, 0, 1)[..., None]).astype(np.float32)


def styled(image: np.ndarray, style: str) -> np.ndarray:
    if style == "photo":
        return np.clip(image, 0, 1)
    canvas = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))
    if style == "painting":  # blotches of paler colour on warm paper
        soft = np.asarray(canvas.filter(ImageFilter.MedianFilter(5))).astype(np.float32) / 255
        return soft * 0.62 + np.array([0.38, 0.36, 0.31], np.float32)
    grey = canvas.convert("L")  # sketch: pale grey, edges in pencil
    edges = grey.filter(ImageFilter.FIND_EDGES)
    edges.paste(0, (0, 0, SIZE, 1)), edges.paste(0, (0, SIZE - 1, SIZE, SIZE))  # type: ignore[func-returns-value]
    edges.paste(0, (0, 0, 1, SIZE)), edges.paste(0, (SIZE - 1, 0, SIZE, SIZE))  # type: ignore[func-returns-value]
    pencil = np.asarray(edges.filter(ImageFilter.GaussianBlur(0.6))).astype(np.float32) / 255
    pale = 0.60 + 0.36 * np.asarray(grey.filter(ImageFilter.GaussianBlur(0.5))).astype(np.float32) / 255
    return np.repeat(np.clip(pale - 0.75 * pencil, 0, 1)[..., None], 3, axis=2)


def with_words(scene: Scene, **changes: str) -> Scene:
    """The same scene with another category, colour, place or style: what caption-swaps compare."""
    colour = changes.pop("colour", None)
    if colour:
        scene = replace(scene, design=replace(scene.design, colours=(colour, colour), layout="plain"))
    return replace(scene, **changes)
