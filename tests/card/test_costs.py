"""Memory, waits, copies and FLOPs at true shapes are what is recorded, and nothing is left on the card.

Which cells are measured again here stands in cells.py; `make memory` measures all.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.card import memory_page, ratchet, unet_flops
from tests.card.card import pretended_card
from tests.card.cells import EVERY, MEASURED_AGAIN, Cell
from tests.card.costs import MIB, CellCost
from tests.card.measuring import measured
from tests.card.ratchet import ROOM

pytestmark = pytest.mark.usefixtures("guarded")


def of_one_worker(cell: Cell) -> Any:
    """The tests of a cell share what was measured, so they belong into one process."""
    return pytest.param(cell, marks=pytest.mark.xdist_group(str(cell)), id=str(cell))


of_cells = pytest.mark.parametrize("cell", [of_one_worker(cell) for cell in MEASURED_AGAIN])


@cache
def cost_of(cell: Cell) -> CellCost:
    with pretended_card(meta=True):
        return measured(cell)


@of_cells
def test_a_cell_takes_what_is_recorded(cell):
    """In either direction: what got better is recorded too, else it could get lost again."""
    cost = cost_of(cell)
    found = ratchet.differences(ratchet.read().get(cell, {}), cost.recorded())
    lines = {f"{stage}: {line}": count for stage, step in cost.stages.items() for line, count in step.lines.items()}
    assert not found, f"run `python -m tests.card.record {cell.method}` if this is meant; waits and copies: {lines}"


@of_cells
def test_a_training_leaves_nothing_on_the_card(cell):
    assert cost_of(cell).left < MIB


@of_cells
def test_after_training_gradients_and_moments_are_gone(cell):
    cost = cost_of(cell)
    assert cost.held < cost.base_model + cost.learned + 4 * MIB


@of_cells
def test_a_probe_waits_for_no_result_and_takes_no_more_memory_than_a_step(cell):
    """But where a step recomputes to save memory: docs/memory.md says how much more it takes there."""
    cost = cost_of(cell)
    assert cost.probe.waits == 0, cost.probe.lines
    assert cell.checkpointing or cost.probe.peak <= (1 + ROOM) * max(step.peak for step in cost.stages.values())


def test_every_cell_is_recorded():
    assert list(ratchet.read()) == list(EVERY)


def test_the_page_shows_what_is_recorded():
    assert memory_page.PAGE.read_text() == memory_page.text(ratchet.read()), "docs/memory.md is stale: `make memory`"


# Batch items a step, and the stages whose FLOPs in the U-Net are those of a plain forward and backward pass.
FROZEN = {
    "textual_inversion": ("embedding", 4),
    "dti": ("direction", 4),
    "class_diffusion": ("weights", 2),
    "custom_diffusion": ("weights", 8),
    "xti": ("embeddings", 8),
    "neti": ("mapper", 8),
    "lora_dreambooth": ("changes", 1),
    "personalized_residuals": ("residuals", 4),
}
TRAINED = {
    "dreambooth": ("weights", 2),
    "ti_db": ("joint", 8),
    "core": ("unet", 4),
    "attn_dreambooth": ("unet", 8),
}


PLAIN = [cell for cell in EVERY if cell.setting == "bf16" and cell.method in FROZEN | TRAINED]


@pytest.mark.parametrize("cell", PLAIN, ids=str)
def test_a_step_computes_what_the_architecture_asks_for(cell):
    """In the U-Net alone, which is in bfloat16: counted by torch, against a formula by hand."""
    flops = unet_flops.unet(cell.base)
    stage, rows = (FROZEN | TRAINED)[cell.method]
    expected = rows * (flops.trained if cell.method in TRAINED else flops.frozen)
    counted = ratchet.read()[cell][f"training, {stage}"]["gflop_bfloat16"] * 1e9
    assert counted == pytest.approx(expected, rel=0.05)
