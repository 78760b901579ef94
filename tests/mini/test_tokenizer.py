"""The pruned tokenizer segments the words it was made for as CLIP does, and takes new ones."""

import pytest

from personalize_core.mini import tokenizer


@pytest.fixture
def words(tmp_path):
    tokenizer.build(tmp_path)
    return tokenizer.load(tmp_path)


def test_its_words_are_segmented_as_by_clip(words):
    merges = tokenizer.clip_merges()
    for word in tokenizer.words():
        assert words.tokenize(word) == tokenizer.segment(word, merges)[0]


def test_the_end_token_has_the_highest_id_and_fills_up(words):
    assert words.eos_token_id == len(words) - 1 == words.pad_token_id
    ids = words("a mug", padding="max_length").input_ids
    assert len(ids) == 77 == words.model_max_length
    assert ids[0] == words.bos_token_id and set(ids[3:]) == {words.eos_token_id}


def test_sks_is_one_token(words):
    assert words.tokenize(tokenizer.RARE_TOKEN) == ["sks</w>"]


def test_an_unknown_word_falls_to_pieces_that_spell_it(words):
    pieces = words.tokenize("xylophone")
    assert len(pieces) > 1 and "".join(pieces) == "xylophone</w>"
    assert words.decode(words("xylophone").input_ids, skip_special_tokens=True).strip() == "xylophone"


def test_a_new_token_stays_whole_and_survives_saving(words, tmp_path):
    words.add_tokens(["<dog1>"])
    assert words.tokenize("a <dog1> dog") == ["a</w>", "<dog1>", "dog</w>"]
    words.save_pretrained(tmp_path / "saved")
    assert tokenizer.load(tmp_path / "saved").tokenize("a <dog1> dog") == ["a</w>", "<dog1>", "dog</w>"]
