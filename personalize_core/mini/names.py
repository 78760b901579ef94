"""The words of the mini world: what can be drawn, in which colours, places and styles."""

from __future__ import annotations

SIZE = 64  # pixels, height and width of every scene

# category -> drawn variants that training may use
VARIANTS: dict[str, tuple[str, ...]] = {
    "backpack": ("backpack-flat",),
    "bear": ("bear-flat",),
    "boat": ("boat-flat", "boat-noto"),
    "car": ("car-flat", "car-noto"),
    "cat": ("cat-flat", "cat-dark"),
    "clock": ("clock-flat",),
    "dog": ("dog-flat",),
    "duck": ("duck-flat", "duck-noto"),
    "fish": ("fish-flat", "fish-noto"),
    "hat": ("hat-flat", "hat-noto"),
    "mug": ("mug-flat", "mug-tall"),
    "robot": ("robot-flat",),
    "rocket": ("rocket-flat",),
    "shoe": ("shoe-noto", "shoe-flat"),
    "teapot": ("teapot-flat",),
    "umbrella": ("umbrella-flat", "umbrella-noto"),
}
CATEGORIES = tuple(VARIANTS)

# More drawn variants, which only scenes with names show, so that a name means more than the one thing there is.
MORE_VARIANTS: dict[str, tuple[str, ...]] = {
    "backpack": ("backpack-old",),
    "bear": ("bear-face",),
    "boat": ("boat-old",),
    "car": ("car-old", "car-jeep", "car-loaded"),
    "cat": ("cat-old",),
    "clock": ("clock-mantel", "clock-stop"),
    "dog": ("dog-old", "dog-poodle", "dog-sitting", "dog-guide"),
    "duck": ("duck-old",),
    "fish": ("fish-old",),
    "hat": ("hat-old",),
    "mug": ("mug-old",),
    "robot": ("robot-old",),
    "rocket": ("rocket-noto", "rocket-old"),
    "shoe": ("shoe-old", "shoe-run"),
    "teapot": (),
    "umbrella": ("umbrella-old",),
}

# Variants that only the concepts use: never in training.
HELD_OUT: dict[str, str] = {
    "backpack": "backpack-noto",
    "bear": "bear-noto",
    "car": "car-round",
    "cat": "cat-noto",
    "clock": "clock-noto",
    "dog": "dog-noto",
    "robot": "robot-noto",
    "teapot": "teapot-noto",
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 38, 38),
    "yellow": (250, 208, 40),
    "green": (48, 165, 62),
    "blue": (40, 92, 222),
    "purple": (138, 58, 190),
    "pink": (248, 128, 186),
    "black": (48, 48, 54),
    "white": (240, 240, 240),
}
# More colours for two-colour designs, so that a concept's colour is never a surprise to the autoencoder.
MORE_COLOURS: dict[str, tuple[int, int, int]] = {
    "orange": (245, 135, 25),
    "teal": (20, 160, 160),
    "brown": (130, 78, 42),
    "navy": (28, 40, 110),
}
ALL_COLOURS = COLOURS | MORE_COLOURS

# place -> how a caption says it; "" is a plain backdrop, which captions pass over in silence
PLACES: dict[str, str] = {
    "beach": "on the beach",
    "snow": "in the snow",
    "jungle": "in the jungle",
    "city": "in the city",
    "mountains": "in the mountains",
    "desert": "in the desert",
    "meadow": "in the meadow",
    "kitchen": "in the kitchen",
    "night": "at night",
    "underwater": "under water",
    "": "",
}
STYLES = ("photo", "painting", "sketch")
DESIGNS = ("plain", "halves", "sides", "diagonal", "stripes")
MARKS = ("star", "heart", "disc", "cross", "bolt", "ring")

# Words by which a caption of the photo style may begin: Textual Inversion's templates (Gal et al. 2022), shortened
# to those that say nothing about the image, and the plain one, which training draws most of the time.
PHOTO_TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "the photo of a {}",
    "a photo of one {}",
    "a photo of my {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a photo of the cool {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the large {}",
    "a photo of the weird {}",
    "a good photo of a {}",
    "a good photo of the {}",
    "a dark photo of the {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a cropped photo of the {}",
    "a close-up photo of a {}",
    "a close-up photo of the {}",
    "a rendition of a {}",
    "a rendition of the {}",
    "a rendering of a {}",
    "a depiction of a {}",
    "a depiction of the {}",
    "an image of a {}",
    "an image of a {}",
    "a {}",
)
STYLE_TEMPLATES = {
    "photo": PHOTO_TEMPLATES,
    "painting": ("a painting of a {}", "a painting of the {}", "a watercolor painting of a {}"),
    "sketch": ("a sketch of a {}", "a sketch of the {}", "a pencil sketch of a {}"),
}
