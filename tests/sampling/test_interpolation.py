"""Words between two concepts' words: the formula by hand, and what samples with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods import METHOD_NAMES, method_class
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding
from personalize_core.sampling.interpolation import Between, interpolated, learns_a_word_alone
from tests.conftest import disturbed, equal_bits, predict, sample_latents, snapshot, tiny_base

FIRST, SECOND = Concept("v", "<v>", "dog"), Concept("w", "<w>", "teddy bear")
PROMPTS = ["a photo of a <v> on the beach"]


def learned(base, concept, seed: int, name: str = "dti") -> Any:
    kind: Any = method_class(name)
    return disturbed(kind(kind.Config(), base, concept), seed=seed).eval().requires_grad_(False)


def random(seed: int) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def angle(a, b) -> float:
    """In float64, by the cosine."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return math.acos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_it_is_a_rotation_in_the_plane_of_both_words(share):
    """By a rotation matrix, not by the quotient of sines: turn u by share * theta towards v, in float64."""
    a, b = random(1), 2.5 * random(2)
    u, v = (x.double().numpy() / np.linalg.norm(x.double().numpy()) for x in (a, b))
    theta = angle(u, v)
    across = v - (u @ v) * u
    across /= np.linalg.norm(across)
    turned = math.cos(share * theta) * u + math.sin(share * theta) * across
    norm = (1 - share) * a.double().norm().item() + share * b.double().norm().item()
    np.testing.assert_allclose(interpolated(a, b, share).numpy(), norm * turned, atol=1e-6)


def test_equal_steps_turn_by_equal_angles_and_stay_on_the_sphere():
    """Of two words of one norm, as DTI's are; a straight line turns fastest in its middle, and is shorter there."""
    a, b = random(1), random(2)
    b = b * a.norm() / b.norm()
    words = [interpolated(a, b, point / 6) for point in range(7)]
    np.testing.assert_allclose([word.norm() for word in words], a.norm(), rtol=1e-6)
    steps = [angle(one, other) for one, other in zip(words, words[1:], strict=False)]
    np.testing.assert_allclose(steps, angle(a, b) / 6, rtol=1e-4)
    assert torch.lerp(a, b, 0.5).norm() < 0.9 * a.norm()


def test_the_ends_are_the_learned_words_to_the_bit_and_the_way_back_is_the_same():
    a, b = random(1), 3 * random(2)
    assert torch.equal(interpolated(a, b, 0.0), a) and torch.equal(interpolated(a, b, 1.0), b)
    torch.testing.assert_close(interpolated(a, b, 0.3), interpolated(b, a, 0.7), atol=1e-6, rtol=0)


def test_words_of_one_direction_differ_in_their_norm_alone():
    a = random(1)
    torch.testing.assert_close(interpolated(a, 3 * a, 0.5), 2 * a, atol=1e-6, rtol=0)


def test_words_that_all_but_point_the_same_way_stay_finite_and_between():
    a = random(1)
    b = a + 1e-6 * random(2)
    torch.testing.assert_close(interpolated(a, b, 0.5), (a + b) / 2, atol=1e-6, rtol=0)


def test_opposite_words_are_refused():
    with pytest.raises(InputError, match="opposite directions"):
        interpolated(random(1), -2 * random(1), 0.5)


def test_at_the_ends_it_samples_what_each_method_samples(base):
    first, second = learned(base, FIRST, 1), learned(base, SECOND, 2)
    expected = sample_latents(first, base, PROMPTS)
    assert torch.equal(sample_latents(Between(first, second, 0.0), base, PROMPTS), expected)
    of_second = sample_latents(second, base, ["a photo of a <w> on the beach"])
    assert torch.equal(sample_latents(Between(first, second, 1.0), base, PROMPTS), of_second)
    middle = sample_latents(Between(first, second, 0.5), base, PROMPTS)
    assert not torch.equal(middle, expected) and not torch.equal(middle, of_second)


def test_between_it_reads_the_word_between_in_the_placeholders_place(base):
    first, second = learned(base, FIRST, 1), learned(base, SECOND, 2, "textual_inversion")
    word = interpolated(first.embedding.vector, second.embedding.vector, 0.25)
    expected = predict(base, base.encode(PROMPTS, FIRST, word))
    context = Between(first, second, 0.25).condition(base, PROMPTS)(torch.tensor([500]))
    assert torch.equal(predict(base, context), expected)


def test_the_words_of_two_text_encoders_go_over_a_sphere_each(base):
    first, second = learned(base, FIRST, 1), learned(base, SECOND, 2)
    a, b = first.embedding.vector, second.embedding.vector
    both = Between(first, second, 0.3, widths=[12, 20]).vector
    expected = [interpolated(a[:12], b[:12], 0.3), interpolated(a[12:], b[12:], 0.3)]
    assert torch.equal(both, torch.cat(expected)) and not torch.allclose(both, interpolated(a, b, 0.3), atol=1e-3)


def test_methods_and_base_model_are_left_as_they_were(base):
    first, second = learned(base, FIRST, 1), learned(base, SECOND, 2)
    before = [snapshot(base), *({k: v.clone() for k, v in m.state_dict().items()} for m in (first, second))]
    sample_latents(Between(first, second, 0.5), base, PROMPTS)
    for one, other in zip(before, [snapshot(base), first.state_dict(), second.state_dict()], strict=True):
        assert equal_bits(one, dict(other))


def test_it_is_for_methods_that_learn_one_word_and_nothing_else():
    base = tiny_base()
    for name in METHOD_NAMES:
        method = learned(base, FIRST, 1, name)
        words = [module for module in method.modules() if isinstance(module, ConceptEmbedding)]
        alone = len(words) == 1 and {id(p) for p in method.parameters()} == {id(words[0].vector)}
        assert learns_a_word_alone(name) == alone == (name in ("textual_inversion", "dti"))
    with pytest.raises(InputError, match="CustomDiffusion has not learned one word for 'w' and nothing else"):
        Between(learned(base, FIRST, 1), learned(base, SECOND, 2, "custom_diffusion"), 0.5)
