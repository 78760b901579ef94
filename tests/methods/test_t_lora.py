"""T-LoRA adds a low-rank change whose rank falls with the noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from personalize_core.methods.shared.layer_modules import attention_projections
from personalize_core.methods.t_lora.method import Config, MaskedLowRank, TLoRA
from tests.conftest import LAYERS, disturbed


@pytest.fixture
def make(base, concept) -> Any:
    return lambda **chosen: TLoRA(Config(steps=3, **chosen), base, concept)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def test_the_change_is_eq_6_item_by_item():
    change = disturbed(MaskedLowRank(6, 5, 4, orthogonal=True))
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))
    found = change(x, torch.tensor([4, 1, 0]))
    for item, active in enumerate((4, 1, 0)):
        M_t = np.diag([1.0] * active + [0.0] * (4 - active))
        now = array(change.B) @ np.diag(array(change.S)) @ M_t @ array(change.A)
        start = array(change.B_init) @ np.diag(array(change.S_init)) @ M_t @ array(change.A_init)
        np.testing.assert_allclose(array(found[item]), array(x[item]) @ (now - start).T, atol=1e-6)
    assert not found[2].any() and found[1].any()


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 6), (6, 9)])
def test_the_start_is_the_end_of_a_random_matrixs_singular_value_decomposition(inputs, outputs):
    torch.manual_seed(3)
    change = MaskedLowRank(inputs, outputs, 4, orthogonal=True)
    torch.manual_seed(3)
    values = np.linalg.svd(array(torch.randn(outputs, inputs) / 4), compute_uv=False)  # NumPy's own decomposition
    np.testing.assert_allclose(array(change.S), values[-4:], rtol=1e-5)
    np.testing.assert_allclose(array(change.A @ change.A.T), np.eye(4), atol=1e-6)
    np.testing.assert_allclose(array(change.B.T @ change.B), np.eye(4), atol=1e-6)
    assert not change(torch.randn(2, 3, inputs), torch.tensor([4, 2])).any()


def test_without_it_the_start_is_loras():
    torch.manual_seed(0)
    change = MaskedLowRank(1280, 640, 4, orthogonal=False)
    assert abs(change.A.std() - 1 / 4) < 0.01 and not change.B.any() and change.S.tolist() == [1] * 4


def test_a_layer_narrower_than_the_rank_has_its_width():
    assert MaskedLowRank(6, 5, 64, orthogonal=True).rank == 5


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize(("rank", "min_rank"), [(64, 1), (4, 2), (5, 0), (3, 3)])
def test_the_rank_falls_with_the_noise_as_the_paper_writes_it(rank, min_rank, alpha, make):
    method = make(rank=rank, min_rank=min_rank, alpha=alpha)
    t = torch.tensor([0, 1, 250, 500, 999])
    expected = [math.floor((rank - min_rank) * ((1000 - n) / 1000) ** alpha) + min_rank for n in t.tolist()]
    assert method.active(rank, t).tolist() == expected and expected[0] == rank


def test_unmasked_every_component_acts_always(make):
    assert make(masked=False, rank=8).active(8, torch.tensor([0, 999])).tolist() == [8, 8]


def test_the_layers_see_the_timestep_of_each_item(make, base, concept):
    """As merged into the weights for one timestep at a time, without a hook."""
    method = disturbed(make(rank=6, min_rank=0)).eval()
    context = base.encode(["a photo of <v> dog", "the desert"], concept)
    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 800])
    with torch.no_grad(), method.attach(base):
        together = base.denoise(x_t, t, context)
    layers = attention_projections(base)
    for item in range(2):
        before = {path: layer.weight.clone() for path, layer in layers.items()}
        with torch.no_grad():
            for path, layer in layers.items():
                change: Any = method.changes[path.replace(".", "/")]
                active = math.floor(change.rank * (1000 - int(t[item])) / 1000)
                layer.weight += (change.B[:, :active] * change.S[:active]) @ change.A[:active]
                layer.weight -= (change.B_init[:, :active] * change.S_init[:active]) @ change.A_init[:active]
            merged = base.denoise(x_t, t[[item, item]], context)[item]
            for path, layer in layers.items():
                layer.weight.copy_(before[path])
        torch.testing.assert_close(together[item], merged, atol=2e-4, rtol=1e-3)


def test_it_trains_factors_and_values_with_the_papers_decay(make):
    (stage,) = make().stages()
    (group,) = stage.param_groups
    assert group["weight_decay"] == 1e-4 and len(group["params"]) == 3 * 8 * len(LAYERS)
    assert not {"A_init", "B_init", "S_init"} & {name.rpartition(".")[2] for name, _ in make().named_parameters()}


def test_the_recipe_is_the_papers():
    c = Config()
    assert (c.steps, c.batch_size, c.lr, c.weight_decay) == (800, 1, 1e-4, 1e-4)
    assert Config.ablations["vanilla"].changes["steps"] == 500


@pytest.mark.parametrize("chosen", [{"masked": False, "min_rank": 2}, {"rank": 4, "min_rank": 5}])
def test_options_that_contradict_each_other_are_refused(chosen):
    with pytest.raises((ValidationError, ValueError)):
        Config(**chosen)
