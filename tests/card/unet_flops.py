"""FLOPs of Stable Diffusion's U-Net by hand, from its published architecture (Rombach et al. 2022, table 15).

Two FLOPs for each multiplication with an addition, as PyTorch's counter has it; of matrix products, convolutions and
attention.
"""

from __future__ import annotations

from dataclasses import dataclass

CHANNELS, SIDES = (320, 640, 1280, 1280), (64, 32, 16, 8)  # of the four resolutions, at 512 pixels
TIME, TOKENS, LATENT = 1280, 77, 4


@dataclass(frozen=True)
class Flops:
    """Of one forward pass of one row."""

    products: int = 0  # convolutions and linear layers
    attention: int = 0  # queries with keys, and probabilities with values

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.products + other.products, self.attention + other.attention)

    @property
    def forward(self) -> int:
        return self.products + self.attention

    @property
    def frozen(self) -> float:
        """Forward, and backward to the activations alone.

        The gradient of a layer's input costs what the layer costs. Attention's backward has five products where its
        forward has two, because it computes the scores again (Dao et al. 2022, algorithm 4).
        """
        return 2 * self.products + 3.5 * self.attention

    @property
    def trained(self) -> float:
        """Forward, and backward to activations and all weights: one more product for each layer."""
        return 3 * self.products + 3.5 * self.attention


def unet(text_width: int) -> Flops:
    """text_width: 768 for Stable Diffusion 1, 1024 for 2."""
    total = _conv(LATENT, CHANNELS[0], SIDES[0]) + _conv(CHANNELS[0], LATENT, SIDES[0])
    total += _linear(CHANNELS[0], TIME, 1) + _linear(TIME, TIME, 1)
    skips, inputs = [CHANNELS[0]], CHANNELS[0]
    for level, (width, side) in enumerate(zip(CHANNELS, SIDES, strict=True)):
        for _ in range(2):
            total += _resnet(inputs, width, side)
            total += _transformer(width, side, text_width) if level < 3 else Flops()
            inputs = width
            skips.append(width)
        if level < 3:
            total += _conv(width, width, SIDES[level + 1])
            skips.append(width)
    total += _resnet(inputs, inputs, SIDES[3]) + _transformer(inputs, SIDES[3], text_width)
    total += _resnet(inputs, inputs, SIDES[3])
    for level in (3, 2, 1, 0):
        width, side = CHANNELS[level], SIDES[level]
        for _ in range(3):
            total += _resnet(inputs + skips.pop(), width, side)
            total += _transformer(width, side, text_width) if level < 3 else Flops()
            inputs = width
        if level > 0:
            total += _conv(width, width, SIDES[level - 1])
    return total


def _conv(inputs: int, outputs: int, side: int, kernel: int = 3) -> Flops:
    return Flops(products=2 * kernel**2 * inputs * outputs * side**2)


def _linear(inputs: int, outputs: int, rows: int) -> Flops:
    return Flops(products=2 * inputs * outputs * rows)


def _resnet(inputs: int, outputs: int, side: int) -> Flops:
    convolutions = _conv(inputs, outputs, side) + _conv(outputs, outputs, side) + _linear(TIME, outputs, 1)
    return convolutions + (_conv(inputs, outputs, side, kernel=1) if inputs != outputs else Flops())


def _transformer(width: int, side: int, text_width: int) -> Flops:
    """Projections in and out, self-attention, cross-attention, and a feed-forward layer with GEGLU."""
    rows = side**2
    projections = _linear(width, width, 2 * rows) + _linear(width, width, 4 * rows) + _linear(width, width, 2 * rows)
    text = _linear(text_width, width, 2 * TOKENS)
    feed_forward = _linear(width, 8 * width, rows) + _linear(4 * width, width, rows)
    looks = Flops(attention=2 * 2 * rows * rows * width + 2 * 2 * rows * TOKENS * width)
    return projections + text + feed_forward + looks
