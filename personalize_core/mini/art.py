"""Build the sprites from three packages of emoji art: `python -m personalize_core.mini.art FOLDER`.

FOLDER holds the unpacked npm packages `@iconify-json/fluent-emoji-flat` (MIT, (c) Microsoft Corporation),
`@iconify-json/noto` and `@iconify-json/noto-v1` (Apache-2.0, (c) Google Inc) as `flat/package`, `noto/package` and
`noto-v1/package`. A sprite keeps the drawing's
shading and outline only, as a grey image with alpha; the world paints it. This needs the extra `art`, drawing
scenes does not.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from personalize_core.mini.sprites import FOLDER

SIDE = 72  # pixels, the longer side of a sprite

# sprite -> (package, drawing)
DRAWINGS: dict[str, tuple[str, str]] = {
    "backpack-flat": ("flat", "backpack"),
    "backpack-noto": ("noto", "backpack"),
    "bear-flat": ("flat", "teddy-bear"),
    "bear-noto": ("noto", "teddy-bear"),
    "boat-flat": ("flat", "sailboat"),
    "boat-noto": ("noto", "sailboat"),
    "car-flat": ("flat", "automobile"),
    "car-noto": ("noto", "sport-utility-vehicle"),
    "car-round": ("noto", "automobile"),
    "cat-flat": ("flat", "cat"),
    "cat-dark": ("noto", "black-cat"),
    "cat-noto": ("noto", "cat"),
    "clock-flat": ("flat", "alarm-clock"),
    "clock-noto": ("noto", "alarm-clock"),
    "dog-flat": ("flat", "dog"),
    "dog-noto": ("noto", "dog"),
    "duck-flat": ("flat", "duck"),
    "duck-noto": ("noto", "duck"),
    "fish-flat": ("flat", "fish"),
    "fish-noto": ("noto", "fish"),
    "hat-flat": ("flat", "top-hat"),
    "hat-noto": ("noto", "top-hat"),
    "mug-flat": ("flat", "hot-beverage"),
    "mug-tall": ("flat", "beer-mug"),
    "robot-flat": ("flat", "robot"),
    "robot-noto": ("noto", "robot"),
    "rocket-flat": ("flat", "rocket"),
    "shoe-noto": ("noto", "running-shoe"),
    "shoe-flat": ("flat", "mans-shoe"),
    "teapot-flat": ("flat", "teapot"),
    "teapot-noto": ("noto", "teapot"),
    "umbrella-flat": ("flat", "umbrella"),
    "umbrella-noto": ("noto", "umbrella"),
    "backpack-old": ("noto-v1", "backpack"),
    "bear-face": ("noto-v1", "bear"),
    "boat-old": ("noto-v1", "sailboat"),
    "car-old": ("noto-v1", "automobile"),
    "car-jeep": ("noto-v1", "sport-utility-vehicle"),
    "car-loaded": ("flat", "sport-utility-vehicle"),
    "cat-old": ("noto-v1", "cat"),
    "clock-mantel": ("flat", "mantelpiece-clock"),
    "clock-stop": ("flat", "stopwatch"),
    "dog-old": ("noto-v1", "dog"),
    "dog-poodle": ("flat", "poodle"),
    "dog-sitting": ("flat", "service-dog"),
    "dog-guide": ("noto", "guide-dog"),
    "duck-old": ("noto-v1", "duck"),
    "fish-old": ("noto-v1", "fish"),
    "hat-old": ("noto-v1", "top-hat"),
    "mug-old": ("noto-v1", "hot-beverage"),
    "robot-old": ("noto-v1", "robot"),
    "rocket-noto": ("noto", "rocket"),
    "rocket-old": ("noto-v1", "rocket"),
    "shoe-old": ("noto-v1", "running-shoe"),
    "shoe-run": ("flat", "running-shoe"),
    "umbrella-old": ("noto-v1", "umbrella"),
}


def rasterise(package: dict, drawing: str, side: int = 256) -> Image.Image:
    import resvg_py  # pyright: ignore[reportMissingImports]  the extra `art`, which development does not need

    icon = package["icons"][drawing]
    width, height = (icon.get(key, package.get(key, 16)) for key in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    rasterised = io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)))
    return Image.open(rasterised, formats=("PNG",)).convert("RGBA")


def shading(image: Image.Image) -> Image.Image:
    """The drawing cropped to its outline, its body's median brightness moved to 128: grey and alpha."""
    image = image.crop(image.getchannel("A").getbbox())
    scale = SIDE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).astype(np.float32) / 255
    alpha = pixels[..., 3]
    brightness = pixels[..., :3] @ np.array([0.35, 0.5, 0.15], np.float32)
    inside = brightness[alpha > 0.9]
    middle, low, high = np.median(inside), *np.percentile(inside, (4, 97))
    darker = (brightness - middle) / max(middle - low, 0.3)
    lighter = (brightness - middle) / max(high - middle, 0.25)
    shade = np.where(brightness < middle, darker, lighter)  # about -1 to 1, 0 is the body's own colour
    grey = np.clip(128 + 110 * shade, 0, 255)
    return Image.merge("LA", [Image.fromarray(c.astype(np.uint8)) for c in (grey, alpha * 255)])


def build(art: Path) -> None:
    packages = {
        name: json.loads((art / name / "package" / "icons.json").read_text()) for name in ("flat", "noto", "noto-v1")
    }
    for sprite, (package, drawing) in DRAWINGS.items():
        shading(rasterise(packages[package], drawing)).save(FOLDER / f"{sprite}.png", optimize=True)
    print(f"{len(DRAWINGS)} sprites in {FOLDER}")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
