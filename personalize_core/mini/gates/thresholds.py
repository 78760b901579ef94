"""What each gate needs, and whether figures reach it."""

from __future__ import annotations

from personalize_core.mini import personalization

Figures = dict[str, float]
ROUNDING = 1e-6  # 95 of 100 as a float32 is less than 0.95
ABOVE_ZERO = 2 * ROUNDING  # an interval that ends at 0 is not above the base model

NEEDED: dict[str, dict[str, float]] = {
    "autoencoder": {"dB on fresh scenes": 28, "dB on the concepts": 28},
    "text": {"category": 0.99, "colour": 0.99, "place": 0.99, "style": 0.99},
    "unet": {"place: wins": 0.90, "category: wins": 0.85, "colour: wins": 0.80},
    "pictures": {"category named": 0.80, "place named": 0.90, "colour named": 0.75},
    "clip": {"zero-shot category": 0.90, "zero-shot place": 0.95},
    "identity": {
        "nearest is the same concept, renders": 0.95,
        "nearest is the same concept, reconstructed renders": 0.95,
    },
    "personalization": {"concepts whose 95 % interval lies above the base model": 8},
    "names": {
        "composed: category": 0.90,
        "composed: one colour": 0.90,
        "composed: both colours": 0.60,
        "composed: first colour wins": 0.80,
        "composed: second colour wins": 0.80,
        "composed: mark wins": 0.80,
    },
    "fitted": {"fitted: category": 0.90, "fitted: one colour": 0.90, "fitted: both colours": 0.60},
    "words": {
        "textual_inversion: concepts whose interval lies above": 7,
        "textual_inversion: category named": 0.85,
    }
    | {f"{method}: low end of its 95 % interval": ABOVE_ZERO for method in personalization.WORDS},
}
# gate -> what a person is to see, in how many images at least, of how many
SEEN = {
    "pictures": ("prompts whose thing and place are recognised by eye", 20, 24),
    "personalization": ("concepts that show their two colours and their mark on a new place, by eye", 6, 8),
}


def passed(gate: str, figures: Figures) -> bool:
    """Whether all that the gate needs is reached; what takes an eye is not, before somebody has looked."""
    enough = all(figures[name] >= least - ROUNDING for name, least in NEEDED[gate].items())
    if gate in SEEN:
        what, least, _ = SEEN[gate]
        return enough and figures.get(what, 0) >= least
    if gate == "autoencoder":
        lost = [
            figures[f"{a} read from originals"] - figures[f"{a} read from reconstructions"]
            for a in ("category", "colour")
        ]
        return enough and max(lost) <= 0.03 + ROUNDING
    return enough
