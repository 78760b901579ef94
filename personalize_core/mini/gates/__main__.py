"""Judge the exported weights: `python -m personalize_core.mini.gates [GATE ...]`. Writes the model card beside them.

What takes an eye is looked at in the images that the gates write, counted, and told to the card: `--seen
pictures=20 personalization=6`. Of a gate that is not asked for, the card keeps the figures as long as the weights they
were measured on are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from personalize_core.mini import loop
from personalize_core.mini.export import WEIGHTS
from personalize_core.mini.gates.judging import Judgement, judged
from personalize_core.mini.gates.model_card import ABOUT
from personalize_core.mini.gates.thresholds import SEEN


def counted(text: str) -> tuple[str, int]:
    """GATE=COUNT."""
    gate, _, count = text.partition("=")
    if gate not in SEEN or not count.isdigit() or int(count) > SEEN[gate][2]:
        these = ", ".join(f"{name}=0 to {name}={all_}" for name, (_, _, all_) in SEEN.items())
        raise argparse.ArgumentTypeError(f"{text!r} is none of {these}")
    return gate, int(count)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m personalize_core.mini.gates", description=__doc__)
    parser.add_argument("gates", nargs="*", metavar="GATE", help=f"of {', '.join(ABOUT)}; all unless named")
    parser.add_argument("--seen", nargs="+", type=counted, default=[], metavar="GATE=COUNT", help="counted by eye")
    parser.add_argument("--work", type=Path, default=loop.WORK)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if unknown := set(options.gates) - set(ABOUT):
        parser.error(f"no gate is called {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    judgement = Judgement(options.work, options.weights, options.guidance, options.samples)
    judged(judgement, options.gates or ([] if options.seen else list(ABOUT)), dict(options.seen))


if __name__ == "__main__":
    main()
