"""Where a change may act: above the median of what one concept is looked at, and not where another is more."""

from __future__ import annotations

import numpy as np
import torch

from personalize_core.localized import above_median, belongs, localized


def test_about_half_of_the_locations_are_inside():
    attention = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    assert above_median(attention).sum(dim=1).tolist() == [32] * 5


def test_ties_with_the_median_are_outside():
    assert above_median(torch.tensor([[0.0, 1.0, 1.0, 1.0, 2.0]])).tolist() == [[False, False, False, False, True]]
    assert not above_median(torch.zeros(2, 9)).any()
    assert not above_median(torch.tensor([[0.7]])).any()


def test_each_row_has_its_own_median():
    attention = torch.tensor([[0.1, 0.2, 0.3], [10.0, 20.0, 30.0]])
    assert above_median(attention).tolist() == [[False, False, True]] * 2


def test_a_location_that_two_concepts_want_goes_to_the_stronger():
    """Against a loop over the rule: above its own median, and relatively above every other, the first on a tie."""
    draws = torch.Generator().manual_seed(1)
    attention = torch.stack([torch.randperm(49, generator=draws) % 7 for _ in range(6)]).view(3, 2, 49).float()
    scales = torch.tensor([1 / 128, 1 / 2, 1 / 32]).view(3, 1, 1)  # one that is looked at everywhere wins nothing by it
    found = [belongs(list(attention * scales), place).numpy() for place in range(3)]
    looked = attention.double().numpy()  # each with one mean, so that these are relative, and ties are exact
    for row in range(2):
        for n in range(49):
            wanted = looked[:, row, n] > np.sort(looked[:, row], axis=1)[:, 24]
            owner = int(np.argmax(looked[:, row, n]))  # of equals the first
            for place in range(3):
                assert found[place][row, n] == (wanted[place] and owner == place)
    assert all(part.any() for part in found)
    assert not (found[0] & found[1]).any() and not (found[0] & found[2]).any() and not (found[1] & found[2]).any()


def test_a_concept_that_is_alone_competes_with_nobody():
    attention = torch.rand(2, 25, generator=torch.Generator().manual_seed(2))
    assert torch.equal(belongs([attention], 0), above_median(attention))
    unseen = torch.zeros(2, 25)
    assert torch.equal(belongs([attention, unseen], 0), above_median(attention))
    assert not belongs([attention, unseen], 1).any()


def test_outside_not_one_bit_changes_whatever_the_axes():
    inside = torch.tensor([[True, False, False, True]])
    original, change = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    answer = localized(inside, original, change)
    expected = np.where(inside.view(2, 2).numpy(), original.numpy() + change.numpy(), original.numpy())
    assert np.array_equal(answer.numpy(), expected)
    rows = localized(inside, original.flatten(2).mT, change.flatten(2).mT)
    assert torch.equal(rows.mT.reshape(1, 3, 2, 2), answer)
