"""The names that people read are the papers', belong to what there is, and never fall together."""

import pytest

from personalize_core.methods import ABLATION_NAMES, METHOD_NAMES
from personalize_core.report.display_names import NAMES, each_in_words, in_words
from personalize_core.report.figures.image_grids import font, wrapped


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model", "base model"),
        ("ti_db", "TI+DB"),
        ("attn_dreambooth", "AttnDreamBooth"),
        ("attn_dreambooth@without_stage_2", "AttnDreamBooth without stage 2"),
        ("attn_dreambooth@without_stage_2_tto", "AttnDreamBooth without stage 2 with test-time optimization"),
        ("core_tto", "CoRe with test-time optimization"),
        ("personalized_residuals_lag", "Personalized Residuals with LAG"),
        ("oft@coft", "COFT"),
        ("core_my_own", "CoRe: my own"),
        ("core@something_new", "CoRe: something new"),
        ("core@something_new_tto", "CoRe: something new with test-time optimization"),
        ("peft@dora_r_32", "PEFT: dora r 32"),  # no variant of peft@dora: it may lie on another adapter
        ("dreambooth@without_prior_2", "DreamBooth without prior 2"),
        ("real_images", "real images"),
        ("my_variant", "my variant"),
    ],
)
def test_a_name_is_read_as_the_papers_write_it(name, words):
    assert in_words(name) == words


def test_every_name_belongs_to_a_method_or_an_ablation_that_there_is():
    assert set(NAMES) <= {*METHOD_NAMES, *ABLATION_NAMES}


def test_no_two_are_read_alike_and_all_can_be_listed_in_a_sentence():
    words = [in_words(name) for name in (*METHOD_NAMES, *ABLATION_NAMES, "core_tto", "personalized_residuals_lag")]
    assert len(set(words)) == len(words)
    assert not [one for one in words if "," in one or " and " in one or "_" in one.replace("proj_", "")]


def test_the_numbers_of_an_analysis_are_read_part_by_part():
    assert each_in_words("core_tto, share absent") == "CoRe with test-time optimization, share absent"
    assert each_in_words("cosine with the start") == "cosine with the start"


def test_a_long_name_is_broken_between_words_and_stands_beside_its_row_in_few_lines():
    for name in (*METHOD_NAMES, *ABLATION_NAMES):
        assert wrapped(in_words(name), font(15, bold=True), 154).count("\n") < 6  # a cell has room for 7
