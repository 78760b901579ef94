"""OFT turns the input of every attention projection by a block-diagonal rotation."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import OFTConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from torch import nn

from personalize_core.errors import InputError
from personalize_core.methods.oft.method import OFT, Config, Rotation, solve_together
from personalize_core.methods.shared.layer_modules import attention_projections
from personalize_core.training.loop import denoising_step, diffusion_loss, train
from tests.artifacts.test_export import check_same, fresh_pipeline
from tests.conftest import LAYERS, disturbed, predict, tiny_base

PROMPT = "a photo of <v> dog on the beach"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"block_share": True},
    "rescaled": {"rescaled": True},
    "both": {"block_share": True, "rescaled": True},
}
of_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def rotation_of(inputs: int = 12, outputs: int = 5, r: int = 3, block_share=False, rescaled=False) -> Rotation:
    """One with random parameters, in float64."""
    return disturbed(Rotation(inputs, outputs, r, block_share, rescaled)).double()


def make(base, concept, **chosen) -> Any:
    return OFT(Config(steps=3, **chosen), base, concept)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


# -- the rotation, against the paper's formulae in NumPy -------------------------------------------------------


def cayley(A: np.ndarray) -> np.ndarray:
    """As the paper writes it, (I + Q)(I - Q)^-1, with Q = -S."""
    Q, identity = -(A - A.T) / 2, np.eye(len(A))
    return (identity + Q) @ np.linalg.inv(identity - Q)


def merged(A: np.ndarray, W0: np.ndarray, r: int, log_scale: np.ndarray | None) -> np.ndarray:
    """diag(s) W0 R^T, with R put together block by block."""
    R, n = np.zeros((W0.shape[1],) * 2), A.shape[1]
    for i in range(r):
        R[i * n : (i + 1) * n, i * n : (i + 1) * n] = cayley(A[i % len(A)])
    s = np.ones(len(W0)) if log_scale is None else np.exp(log_scale)
    return np.diag(s) @ W0 @ R.T


def answer(rotation: Rotation, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer's, with the rotation attached by hand."""
    y = layer(rotation.turn(x, rotation.blocks()))
    return y if rotation.log_scale is None else rotation.rescale(y, layer.bias)


@of_kinds
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_computes_s_w0_r_transposed_x_plus_b(kind, bias):
    rotation, layer = rotation_of(**kind), nn.Linear(12, 5, bias=bias).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_scale = None if rotation.log_scale is None else array(rotation.log_scale)
    W = merged(array(rotation.A), array(layer.weight), 3, log_scale)
    expected = array(x) @ W.T + (array(layer.bias) if bias else 0)
    np.testing.assert_allclose(array(answer(rotation, layer, x)), expected, atol=1e-12)


@of_kinds
def test_its_gradients_are_the_finite_differences_of_the_formula(kind):
    rotation, layer = rotation_of(**kind), nn.Linear(12, 5).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 12, dtype=torch.float64, generator=generator)
    wanted = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    loss = (answer(rotation, layer, x) * wanted).sum()
    gradients = torch.autograd.grad(loss, list(rotation.parameters()))

    values = {name: array(parameter) for name, parameter in rotation.named_parameters()}
    W0, b, h = array(layer.weight), array(layer.bias), 1e-6

    def formula() -> float:
        W = merged(values["A"], W0, 3, values.get("log_scale"))
        return float(((array(x) @ W.T + b) * array(wanted)).sum())

    for (name, _), gradient in zip(rotation.named_parameters(), gradients, strict=True):
        slopes, flat = np.zeros(values[name].size), values[name].reshape(-1)
        for i in range(flat.size):
            kept = flat[i]
            flat[i] = kept + h
            above = formula()
            flat[i] = kept - h
            slopes[i] = (above - formula()) / (2 * h)
            flat[i] = kept
        np.testing.assert_allclose(array(gradient).reshape(-1), slopes, atol=1e-7)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("share", [False, True])
def test_few_rows_are_turned_themselves_and_for_many_the_weight_to_the_same_values_and_gradients(rows, share):
    """Beside the dense matrices: y = x R W0^T + b, with R^T x as the row x R."""
    torch.manual_seed(0)
    layer, rotation = nn.Linear(12, 8).requires_grad_(False), Rotation(12, 8, 3, share, rescaled=False)
    rotation.A.data.normal_()
    x = torch.randn(2, rows // 2 + 1, 12, requires_grad=True)
    y = rotation.linear(x, layer, rotation.blocks())
    found = torch.autograd.grad(y.sin().sum(), [x, rotation.A])

    identity = torch.eye(4)
    each = [
        torch.linalg.inv(identity + S) @ (identity - S) for A in rotation.A.expand(3, -1, -1) for S in [(A - A.mT) / 2]
    ]
    expected = x @ torch.block_diag(*each) @ layer.weight.mT + layer.bias
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for own, other in zip(found, torch.autograd.grad(expected.sin().sum(), [x, rotation.A]), strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_layers_are_solved_together_as_each_by_itself(base, concept):
    rotations = dict(make(base, concept).rotations.by_path())
    for rotation in rotations.values():
        rotation.A.data.normal_()
    together = solve_together(rotations)
    assert len({rotation.A.shape for rotation in rotations.values()}) > 1
    assert together.keys() == rotations.keys()
    for path, rotation in rotations.items():
        torch.testing.assert_close(together[path], rotation.blocks())


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_a_rotation_is_orthogonal_whatever_its_parameters(size):
    rotation = Rotation(320, 4, 4, block_share=False, rescaled=False)
    with torch.no_grad():
        rotation.A += size * torch.randn(rotation.A.shape, generator=torch.Generator().manual_seed(0))
        R = rotation.blocks()
    assert R.dtype == torch.float32
    identity = torch.eye(80).expand(4, -1, -1)
    torch.testing.assert_close(R @ R.mT, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(R.mT @ R, identity, atol=1e-5, rtol=0)
    assert (torch.linalg.det(R.double()) - 1).abs().max() < 1e-4  # no reflection


def test_it_stays_orthogonal_under_autocast():
    rotation = disturbed(Rotation(64, 4, 4, block_share=False, rescaled=False))
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        R, turned = rotation.blocks(), rotation.turn(x, rotation.blocks())
    assert R.dtype == torch.float32
    torch.testing.assert_close(R @ R.mT, torch.eye(16).expand(4, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1), atol=1e-4, rtol=0)


def test_half_precision_features_come_back_as_they_came():
    rotation = disturbed(Rotation(64, 4, 4, block_share=False, rescaled=True))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert rotation.turn(x, rotation.blocks()).dtype == torch.bfloat16
    assert rotation.rescale(x[:, :4], None).dtype == torch.bfloat16


def test_angles_between_neurons_stay_as_they_were():
    """What the method is for: R turns all neurons of a layer alike."""
    rotation, W0 = rotation_of(), torch.randn(5, 12, dtype=torch.float64)
    W = torch.tensor(merged(array(rotation.A), array(W0), 3, None))
    torch.testing.assert_close(W @ W.T, W0 @ W0.T)
    assert (W - W0).abs().max() > 0.1


def test_shared_blocks_are_one_block_repeated():
    rotation = rotation_of(block_share=True)
    assert rotation.A.shape == (1, 4, 4)
    blocks = rotation.blocks()
    assert blocks.shape == (3, 4, 4) and torch.equal(blocks[0], blocks[2])


# -- COFT ------------------------------------------------------------------------------------------------------


def radius(rotation: Rotation, eps: float) -> float:
    """The norm that an A far outside is projected to; the same for every block."""
    with torch.no_grad():
        rotation.A.fill_(100.0)
    rotation.constrain(eps)
    norms = torch.linalg.matrix_norm(rotation.A)
    assert torch.allclose(norms, norms[0])
    return norms[0].item()


@pytest.mark.parametrize(
    ("inputs", "expected"), [(320, 0.192), (640, 0.768), (768, 1.106), (1280, 3.072), (1024, 1.966)]
)
def test_the_radii_are_those_of_the_authors_code(inputs, expected):
    """docs/methods.md#oft, for eps 6e-5 and r 4."""
    assert round(radius(Rotation(inputs, 2, 4, block_share=False, rescaled=False), 6e-5), 3) == expected


def test_a_shared_blocks_radius_is_not_divided_by_the_root_of_r():
    """The authors' code divides by the root of the number of stored blocks."""
    assert radius(Rotation(320, 2, 4, block_share=True, rescaled=False), 6e-5) == pytest.approx(0.384, rel=1e-5)


def test_only_blocks_outside_are_moved_and_straight_towards_zero():
    rotation = rotation_of(r=2)  # blocks of 6, radius eps * 36 / sqrt(2)
    with torch.no_grad():
        rotation.A[1] *= 0.01
    before = rotation.A.detach().clone()
    rotation.constrain(0.02)
    assert torch.equal(rotation.A[1], before[1])
    bound = 0.02 * 36 / 2**0.5
    naive = array(before[0]) * bound / np.sqrt((array(before[0]) ** 2).sum())
    np.testing.assert_allclose(array(rotation.A[0]), naive, rtol=1e-12)


def test_it_is_the_stored_matrix_that_is_bounded_not_its_skew_part():
    rotation = Rotation(8, 2, 2, block_share=False, rescaled=False)
    with torch.no_grad():
        rotation.A.fill_(1.0)  # symmetric: no rotation at all
    rotation.constrain(1e-3)
    assert (rotation.A < 1).all()


def test_training_keeps_every_block_within_the_ball_after_each_step(base, concept, images):
    method = make(base, concept, coft=True, eps=1e-5, lr=1e-2)
    largest = []
    stage = method.stages()[0]
    after_step = stage.after_step

    def watched(index: int) -> None:
        after_step(index)
        rotations: Any = method.rotations.values()
        norms = [torch.linalg.matrix_norm(r.A.detach()) / (1e-5 * r.A.shape[1] ** 2 / 2) for r in rotations]
        largest.append(round(torch.cat(norms).max().item(), 4))

    object.__setattr__(stage, "after_step", watched)
    method.stages = lambda: [stage]
    train(method, base, images, seed=0)
    assert largest == [1.0, 1.0, 1.0]  # on the boundary, and never beyond


def test_with_a_bound_of_zero_training_leaves_the_base_model(base, concept, images):
    method = make(base, concept, coft=True, eps=0.0)
    context = base.encode([PROMPT], concept)
    expected = predict(base, context)
    train(method, base, images, seed=0)
    with method.attach(base):
        assert torch.equal(predict(base, context), expected)


def test_without_coft_nothing_is_bounded(base, concept, images):
    method = make(base, concept, lr=1.0)
    train(method, base, images, seed=0)
    assert max(float(r.A.norm()) for r in method.rotations.values()) > 1  # far beyond 6e-5 n^2 / sqrt(r)


# -- in the U-Net ----------------------------------------------------------------------------------------------


def test_it_turns_all_attention_projections(base, concept):
    paths = [name.replace("/", ".") for name in make(base, concept).rotations]
    named = [
        name
        for name, module in base.unet.named_modules()
        if isinstance(module, nn.Linear) and (".attn1." in name or ".attn2." in name)
    ]
    assert len(paths) == 8 * len(LAYERS) and set(paths) == set(named)


@of_kinds
def test_untrained_it_changes_no_bit(kind, base, concept):
    context = base.encode([PROMPT], concept)
    expected = predict(base, context)
    with make(base, concept, **kind).eval().attach(base):
        assert torch.equal(predict(base, context), expected)


@of_kinds
def test_attached_it_predicts_as_merged_weights_do(kind, base, concept):
    method = disturbed(make(base, concept, **kind)).eval()
    context = base.encode([PROMPT, "the desert"], concept)
    before = predict(base, context)
    with method.attach(base):
        attached = predict(base, context)
    for path, layer in attention_projections(base).items():
        rotation = method.rotations.of(path)
        log_scale = None if rotation.log_scale is None else array(rotation.log_scale)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(merged(array(rotation.A), array(layer.weight), 4, log_scale)))
    torch.testing.assert_close(predict(base, context), attached, atol=1e-5, rtol=0)
    assert (attached - before).abs().max() > 1e-2


def test_in_training_and_in_sampling_it_predicts_alike(base, concept):
    method = disturbed(make(base, concept, rescaled=True))
    context = base.encode([PROMPT], concept)
    with method.train().attach(base):
        trained = predict(base, context)
    with method.eval().attach(base):
        torch.testing.assert_close(predict(base, context), trained, atol=1e-6, rtol=0)


def test_gradient_checkpointing_changes_no_gradient(base, concept, images):
    method = disturbed(make(base, concept, rescaled=True)).train()
    stage = method.stages()[0]
    gradients = []
    for switch in (base.unet.disable_gradient_checkpointing, base.unet.enable_gradient_checkpointing):
        switch()
        with method.attach(base):
            loss = diffusion_loss(denoising_step(method, base, images, stage, seed=0, index=0))
            gradients.append(torch.autograd.grad(loss, list(method.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_training_leaves_the_stored_matrices_skew(base, concept, images):
    """Their symmetric part starts at zero, has no gradient and no effect; so a rotation's free numbers are half."""
    method = make(base, concept, lr=1e-2)
    train(method, base, images, seed=0)
    for rotation in method.rotations.values():
        assert rotation.A.abs().max() > 0
        torch.testing.assert_close(rotation.A, -rotation.A.mT, atol=1e-7, rtol=0)


# -- recipe ----------------------------------------------------------------------------------------------------


def test_the_recipe_is_the_papers():
    """docs/methods.md#oft: its recipe."""
    c = Config()
    assert (c.r, c.block_share, c.coft, c.eps, c.rescaled) == (4, False, False, 6e-5, False)
    assert (c.steps, c.batch_size, c.lr, c.class_images, c.prior_weight) == (1000, 1, 6e-5, 200, 1.0)
    recipe = Config().preprocessing
    assert (recipe.geometry, recipe.interpolation, recipe.flip) == ("crop", "bilinear", False)


def test_it_trains_with_prior_preservation(base, concept, images):
    method = make(base, concept, prior_weight=0.5)
    batch = method.batch(images, 1, torch.Generator())
    assert batch.prompts == ["a photo of <v> dog", "a photo of dog"]
    assert batch.weight.flatten().tolist() == [1.0, 0.5]
    assert Config().class_images_needed == 200 and Config(prior_preservation=False).class_images_needed == 0
    alone = make(base, concept, prior_preservation=False).batch(images, 1, torch.Generator())
    assert alone.prompts == ["a photo of <v> dog"] and torch.equal(alone.latents, batch.latents[:1])


def test_blocks_that_do_not_divide_a_layer_are_refused(base, concept):
    with pytest.raises(InputError, match="^3 blocks do not divide a layer of width 16; OFT needs equal blocks$"):
        make(base, concept, r=3)
    with pytest.raises(InputError, match="16 blocks of a layer of width 16 have one row each, which cannot turn"):
        make(base, concept, r=16)


def test_a_bound_without_coft_is_refused():
    with pytest.raises(ValidationError, match="eps = 0.1 bounds the rotations of COFT, which is off; add `coft: true`"):
        Config(eps=0.1)
    assert Config(eps=0.1, coft=True).eps == 0.1


# -- PEFT ------------------------------------------------------------------------------------------------------


def in_peft(rotation: Rotation, layer: nn.Linear, **options) -> tuple[Any, nn.Parameter]:
    """PEFT's own OFT of the layer, with the same rotation; and its parameter."""
    config = OFTConfig(
        r=rotation.r,
        oft_block_size=0,
        use_cayley_neumann=False,
        block_share=len(rotation.A) == 1,
        target_modules=["0"],
        **options,
    )
    model = get_peft_model(nn.Sequential(layer), config)
    (weight,) = [parameter for name, parameter in model.named_parameters() if "oft_R" in name]
    S = rotation.skew()
    above, right = np.triu_indices(S.shape[1], k=1)
    with torch.no_grad():
        weight.copy_(S[:, above, right])
    return model, weight


@pytest.mark.parametrize("block_share", [False, True])
def test_peft_predicts_the_same_with_the_same_gradient(block_share):
    rotation = disturbed(Rotation(12, 5, 3, block_share, rescaled=False))
    layer = nn.Linear(12, 5)
    model, weight = in_peft(rotation, layer)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    ours, theirs = answer(rotation, layer, x), model(x)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(ours.square().sum(), rotation.A)
    (their_gradient,) = torch.autograd.grad(theirs.square().sum(), weight)
    above, right = np.triu_indices(rotation.A.shape[1], k=1)
    # theirs moves both triangles of S by one number, ours each by half of one
    torch.testing.assert_close(2 * gradient[:, above, right], their_gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_share", [False, True])
def test_peft_projects_to_the_same_rotation(block_share):
    """Its radius lacks the factor n^2, which the authors' code puts into eps beforehand."""
    rotation = disturbed(Rotation(12, 5, 3, block_share, rescaled=False))
    with torch.no_grad():
        rotation.A.copy_(rotation.skew())  # as after any training from zero
    layer, x = nn.Linear(12, 5), torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    model, _ = in_peft(rotation, layer, coft=True, eps=0.01 * 4**2)
    untouched = answer(rotation, layer, x)
    rotation.constrain(0.01)
    torch.testing.assert_close(answer(rotation, layer, x), model(x), atol=1e-6, rtol=0)
    assert (untouched - model(x)).abs().max() > 1e-2


OTHERWISE = {"r": 2, "block_share": True, "coft": True}


@pytest.mark.parametrize(("kind", "merge"), [({}, True), ({}, False), (OTHERWISE, False)], ids=str)
def test_it_loads_in_peft_and_samples_the_same_there(kind, merge, base, concept, tmp_path):
    method = disturbed(make(base, concept, **kind)).eval()
    how = method.export(base, tmp_path)
    assert 'PeftModel.from_pretrained(pipe.unet, "oft")' in how and "'sks dog'" in how
    pipe = fresh_pipeline(base)
    loaded: Any = PeftModel.from_pretrained(pipe.unet, tmp_path / "oft").eval()
    pipe.unet = loaded.merge_and_unload() if merge else loaded.base_model.model
    check_same(pipe, "a photo of sks dog on the beach", method, base)


def test_the_exported_adapter_says_how_it_is_computed(base, concept, tmp_path):
    make(base, concept, r=2).export(base, tmp_path)
    said = json.loads((tmp_path / "oft" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["oft_block_size"], said["use_cayley_neumann"]) == ("OFT", 2, 0, False)


def test_rescaled_it_has_no_public_format(base, concept, tmp_path):
    with pytest.raises(InputError, match="no factor for each output neuron, so rescaled OFT cannot be exported"):
        make(base, concept, rescaled=True).export(base, tmp_path)


def test_it_learns_beside_a_base_model_in_bfloat16_what_it_learns_in_float32(concept, images):
    """The same direction of the gradient; the frozen U-Net's rounding is all that differs."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_base(dtype=dtype)
        method = disturbed(make(base, concept)).train()
        with method.attach(base):
            loss = diffusion_loss(denoising_step(method, base, images, method.stages()[0], seed=0, index=0))
        found = torch.autograd.grad(loss, list(method.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
