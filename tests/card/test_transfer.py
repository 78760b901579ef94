"""Tensors reach a device with their values, shapes and types, in one copy for each type."""

from __future__ import annotations

import pytest
import torch

from personalize_core.base_model.transfer import moved
from tests.card.watch import WATCH

pytestmark = pytest.mark.usefixtures("card")

TENSORS = [torch.randn(2, 3), torch.tensor([True, False]), torch.randn(4), torch.arange(3), torch.randn(())]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_values_shapes_and_types_stay(device):
    found = moved(TENSORS, torch.device(device))
    assert all(tensor.device.type == device for tensor in found)
    for tensor, expected in zip(found, TENSORS, strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor.cpu(), expected)


def test_a_card_gets_one_copy_for_each_type_and_the_host_waits_for_none():
    WATCH.restart()
    moved(TENSORS, torch.device("cuda"))
    assert (WATCH.counts.copies.total(), WATCH.counts.blocking) == (3, 0)


def test_what_is_there_already_is_not_copied():
    there = TENSORS[0].to("cuda")
    WATCH.restart()
    assert moved([there], torch.device("cuda"))[0] is there
    assert not WATCH.counts.copies
