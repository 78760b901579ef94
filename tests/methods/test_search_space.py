"""What `personalize tune` may change of a recipe, and how far: every recipe of the space can be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalize_core.errors import InputError
from personalize_core.methods import (
    ABLATION_NAMES,
    BASELINE,
    METHOD_NAMES,
    ablation_changes,
    is_trained,
    method_of,
    recipe_class,
)
from personalize_core.methods.core.recipe import Config as CoRe
from personalize_core.methods.dreambooth.recipe import Config as DreamBooth
from personalize_core.methods.recipe import Range
from personalize_core.methods.ti_db.recipe import Config as TIDB
from personalize_core.methods.vico.recipe import Config as ViCo
from personalize_core.tuning.space import of_today, rounded, space_of, with_changes
from personalize_core.workspace.params import Params

SHIPPED = Params.read(Path(__file__).parents[2] / "params.yaml")
LEARNING = [name for name in METHOD_NAMES if is_trained(name)]


def recipes(name):
    """As published, and as params.yaml has it for the miniature."""
    published = recipe_class(method_of(name))(**ablation_changes(name))
    try:
        return [published, SHIPPED.config(name)]
    except InputError:  # an ablation whose change contradicts what params.yaml says, or is the method itself there
        return [published]


@pytest.mark.parametrize("name", [*LEARNING, *ABLATION_NAMES])
def test_every_corner_of_the_space_is_a_recipe_and_todays_lies_inside(name):
    for recipe in recipes(name):
        space = space_of(recipe)
        assert space
        for end in ("low", "high"):
            changes = {option: getattr(within, end) for option, within in space.items()}
            built = with_changes(recipe, changes)
            assert {option: getattr(built, option) for option in space} == changes
        for option, value in of_today(recipe, space).items():
            assert space[option].low <= value <= space[option].high, option


@pytest.mark.parametrize("name", LEARNING)
def test_every_method_is_searched_over_a_rate_and_its_steps(name):
    space = space_of(recipe_class(name)())
    assert any(option.endswith("steps") for option in space)
    assert any("lr" in option.split("_") for option in space)


def test_rates_reach_ten_times_either_way_and_steps_from_a_quarter_to_the_double():
    space = DreamBooth(steps=800, lr=1e-5).search_space()
    assert space.keys() == {"steps", "lr"} and space["steps"] == Range(200, 1600)
    assert (space["lr"].low, space["lr"].high) == pytest.approx((1e-6, 1e-4))
    assert DreamBooth(steps=3, lr=1e-5).search_space()["steps"] == Range(1, 6)  # never 0


def test_what_is_left_out_of_a_recipe_is_not_searched():
    assert "lr_embedding" not in TIDB().search_space()
    assert "lr_embedding" in TIDB(lr_embedding=1e-3).search_space()
    assert "unet_steps" not in CoRe(unet_steps=0).search_space()


def test_an_option_without_effect_is_not_searched():
    idle = ViCo(image_attention=False)
    assert "lr" in idle.search_space() and "lr" in space_of(ViCo()) and "lr" not in space_of(idle)


def test_a_method_that_learns_nothing_has_no_space():
    with pytest.raises(InputError, match="no learning rate and no number of steps"):
        space_of(recipe_class(BASELINE)())


def test_values_are_short_and_stay_inside():
    assert rounded(0.00123456, Range(1e-4, 1e-2)) == 0.00123
    assert rounded(0.0001234, Range(0.0001234, 1.0)) == 0.0001234  # 0.000123 would lie outside
    assert rounded(17, Range(3, 40)) == 17
