"""What training, the proof and sampling took of the pretended card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.card.watch import Peak, Watch

MIB, GIB, GFLOP = 2**20, 2**30, 10**9


@dataclass(frozen=True)
class StepCost:
    """Of one step: of the optimizer, or of a sampler."""

    peak: int  # bytes of tensors on the card, the most at once
    in_optimizer: int  # the same within the optimizer's own step; 0 in sampling
    flops: Mapping[str, int]  # type -> FLOPs of matrix products, convolutions and attention
    waits: int  # how often the host waited for a result
    copies: int  # between host and card
    blocking: int  # those of the copies that the host waits for
    calls: int  # operations of torch that were launched
    lines: Mapping[str, int] = field(default_factory=dict)  # which lines of personalize_core waited and copied
    at_peak: Mapping[str, int] = field(default_factory=dict)  # which lines had made what was there at the peak: bytes

    @classmethod
    def read(cls, watch: Watch, before_optimizer: Peak | None = None) -> StepCost:
        """What was counted since the last restart.

        Args:
            before_optimizer: the peak until the optimizer's step began, after which the watch looked for a new one.
        """
        counts, peak = watch.counts, max(watch.peak, before_optimizer or watch.peak, key=lambda peak: peak.size)
        return cls(
            peak=peak.size,
            in_optimizer=watch.peak.size if before_optimizer else 0,
            flops=dict(counts.flops),
            waits=counts.waits.total(),
            copies=counts.copies.total(),
            blocking=counts.blocking,
            calls=counts.calls,
            lines=dict((counts.waits + counts.copies).most_common()),
            at_peak=dict(peak.by_line.most_common()),
        )

    def recorded(self) -> dict[str, int]:
        """Whole numbers for the ratchet."""
        return {
            "peak_mib": _up(self.peak, MIB),
            **({"in_optimizer_mib": _up(self.in_optimizer, MIB)} if self.in_optimizer else {}),
            **{f"gflop_{dtype}": round(flops / GFLOP) for dtype, flops in sorted(self.flops.items())},
            "waits": self.waits,
            "copies": self.copies,
            "blocking_copies": self.blocking,
        }


@dataclass(frozen=True)
class CellCost:
    """Of a method on a base model."""

    base_model: int  # bytes that the base model holds
    loading: int  # the most while it was put on the card
    learned: int  # bytes that the method holds beside it
    stages: Mapping[str, StepCost]  # a later step of each stage
    probe: StepCost  # a few images, sampled and decoded between two steps of the last stage
    held: int  # bytes after training: base model, method and whatever else is left
    proof: (
        int | None
    )  # the most while the loss on the fixed batch and the proof's latents are computed; None: not asked
    sampling: Mapping[str, StepCost]  # sampling strategy -> a step with 16 images
    left: int  # bytes that stay when the method is gone, beyond the base model

    def recorded(self) -> dict[str, dict[str, int]]:
        """Whole numbers for the ratchet."""
        return {
            "memory": {
                "base_model_mib": _up(self.base_model, MIB),
                "loading_mib": _up(self.loading, MIB),
                "learned_mib": _up(self.learned, MIB),
                "held_mib": _up(self.held, MIB),
                **({} if self.proof is None else {"proof_mib": _up(self.proof, MIB)}),
            },
            **{f"training, {stage}": step.recorded() for stage, step in self.stages.items()},
            **{f"sampling, {strategy}": step.recorded() for strategy, step in self.sampling.items()},
        }


def _up(number: int, unit: int) -> int:
    return -(-number // unit)
