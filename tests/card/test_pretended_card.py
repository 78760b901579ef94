"""The pretended card itself: it computes what the CPU computes, refuses what a card refuses, and counts right."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.card.card import pretended_card
from tests.card.on_card import MixedDevices
from tests.card.watch import WATCH


def on_card(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cuda")


@pytest.mark.parametrize(
    "mixing",
    [
        lambda: on_card(3) + torch.ones(3),
        lambda: on_card(3, 3) @ torch.ones(3, 3),
        lambda: torch.cat([on_card(3), torch.ones(3)]),
        lambda: torch.nn.functional.embedding(torch.zeros(1, dtype=torch.long), on_card(3, 3)),
        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda: torch.nn.Linear(3, 3)(on_card(3)),
    ],
)
def test_an_operation_that_mixes_devices_is_refused(card, mixing):
    with pytest.raises(MixedDevices):
        mixing()


def test_numpy_cannot_read_what_lies_on_the_card(card):
    with pytest.raises((RuntimeError, TypeError), match="numpy"):
        on_card(3).numpy()


def test_a_number_and_a_tensor_of_no_dimensions_mix_with_those_of_the_card(card):
    mixed = on_card(3) * torch.tensor(2.0) + 1
    assert mixed.device.type == "cuda" and mixed.tolist() == [3, 3, 3]


def test_training_on_it_learns_what_training_on_the_cpu_learns(card):
    """To rounding: inside are the CPU's own kernels, but the optimizer takes its foreach form, as on a card."""

    def trained(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(8.0).reshape(2, 4).to(device)).pow(2).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    for one, other in zip(trained("cuda"), trained("cpu"), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_autocast_takes_cudas_lists(card):
    """Norms answer in float32 there; on the CPU they answer in bfloat16."""
    x, norm = on_card(2, 4).bfloat16(), torch.nn.LayerNorm(4).to("cuda").bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        assert norm(x).dtype == torch.float32
        assert (x @ x.mT).dtype == torch.bfloat16


def test_memory_is_that_of_the_storages_that_live_in_blocks_of_512_bytes(card):
    WATCH.restart()
    before = WATCH.live
    x = on_card(1024)  # 4 KiB
    view, small = x[3:], on_card(1)
    assert WATCH.live - before == 4096 + 512
    y = x + 1
    del x, y
    gc.collect()
    assert (WATCH.live - before, WATCH.peak.size - before) == (4096 + 512, 8192 + 512)
    del view, small
    gc.collect()
    assert WATCH.live == before


def test_waits_and_copies_are_counted(card):
    x = on_card(4)
    WATCH.restart()
    x.sum().item()
    _ = x[x > 0]
    x.cpu()
    torch.ones(4).to("cuda")
    torch.ones(4).to("cuda", non_blocking=True)
    _ = x + torch.tensor(1.0)
    counts = WATCH.counts
    assert counts.waits.total() == 2
    assert (counts.copies.total(), counts.blocking) == (3, 2)


def test_flops_are_counted_by_type():
    with pretended_card(meta=True):
        WATCH.restart()
        a, b = torch.zeros(8, 16, device="cuda"), torch.zeros(16, 4, device="cuda")
        _ = a @ b
        _ = a.bfloat16() @ b.bfloat16()
        torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8, device="cuda"), torch.zeros(2, 3, 3, 3, device="cuda"))
    assert WATCH.counts.flops == {"float32": 2 * 8 * 16 * 4 + 2 * 36 * 2 * 27, "bfloat16": 2 * 8 * 16 * 4}


def test_without_values_there_are_shapes():
    with pretended_card(meta=True):
        x = torch.zeros(1 << 20, 1 << 20, device="cuda")  # 4 TiB
        assert (x @ x).sum().item() == 1.0
        assert x[0].cpu().shape == (1 << 20,)
