"""FLOPs of Stable Diffusion's U-Nets by hand, from their published architectures.

Rombach et al. (2022), table 15; Podell et al. (2024), table 1, for XL.

Two FLOPs for each multiplication with an addition, as PyTorch's counter has it; of matrix products, convolutions and
attention.
"""

from __future__ import annotations

from dataclasses import dataclass

TIME, TOKENS, LATENT = 1280, 77, 4


@dataclass(frozen=True)
class Architecture:
    """Of each resolution, from the highest: channels, side in latents, and transformer blocks behind each residual
    block."""

    channels: tuple[int, ...]
    sides: tuple[int, ...]
    blocks: tuple[int, ...]
    middle: int  # transformer blocks of the middle
    text_width: int
    told: int = 0  # features of pooled text and sizes


ARCHITECTURES = {
    "sd-1.4": Architecture((320, 640, 1280, 1280), (64, 32, 16, 8), (1, 1, 1, 0), 1, 768),
    "sd-2.1-base": Architecture((320, 640, 1280, 1280), (64, 32, 16, 8), (1, 1, 1, 0), 1, 1024),
    "sdxl-base-1.0": Architecture((320, 640, 1280), (128, 64, 32), (0, 2, 10), 10, 2048, 1280 + 6 * 256),
}


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


def unet(base: str) -> Flops:
    """At the base model's own image size."""
    a = ARCHITECTURES[base]
    highest, lowest = a.channels[0], len(a.channels) - 1
    total = _conv(LATENT, highest, a.sides[0]) + _conv(highest, LATENT, a.sides[0])
    total += _linear(highest, TIME, 1) + _linear(TIME, TIME, 1)
    if a.told:
        total += _linear(a.told, TIME, 1) + _linear(TIME, TIME, 1)
    skips, inputs = [highest], highest
    for level, (width, side) in enumerate(zip(a.channels, a.sides, strict=True)):
        for _ in range(2):
            total += _resnet(inputs, width, side) + _transformer(width, side, a.text_width, a.blocks[level])
            inputs = width
            skips.append(width)
        if level < lowest:
            total += _conv(width, width, a.sides[level + 1])
            skips.append(width)
    total += _resnet(inputs, inputs, a.sides[-1]) + _transformer(inputs, a.sides[-1], a.text_width, a.middle)
    total += _resnet(inputs, inputs, a.sides[-1])
    for level in range(lowest, -1, -1):
        width, side = a.channels[level], a.sides[level]
        for _ in range(3):
            total += _resnet(inputs + skips.pop(), width, side)
            total += _transformer(width, side, a.text_width, a.blocks[level])
            inputs = width
        if level > 0:
            total += _conv(width, width, a.sides[level - 1])
    return total


def _conv(inputs: int, outputs: int, side: int, kernel: int = 3) -> Flops:
    return Flops(products=2 * kernel**2 * inputs * outputs * side**2)


def _linear(inputs: int, outputs: int, rows: int) -> Flops:
    return Flops(products=2 * inputs * outputs * rows)


def _resnet(inputs: int, outputs: int, side: int) -> Flops:
    convolutions = _conv(inputs, outputs, side) + _conv(outputs, outputs, side) + _linear(TIME, outputs, 1)
    return convolutions + (_conv(inputs, outputs, side, kernel=1) if inputs != outputs else Flops())


def _transformer(width: int, side: int, text_width: int, blocks: int) -> Flops:
    """Projections in and out, and in each block self-attention, cross-attention and a feed-forward layer with GEGLU."""
    if not blocks:
        return Flops()
    rows = side**2
    total = _linear(width, width, 2 * rows)
    for _ in range(blocks):
        total += _linear(width, width, 4 * rows) + _linear(width, width, 2 * rows)
        total += _linear(text_width, width, 2 * TOKENS)
        total += _linear(width, 8 * width, rows) + _linear(4 * width, width, rows)
        total += Flops(attention=2 * 2 * rows * rows * width + 2 * 2 * rows * TOKENS * width)
    return total
