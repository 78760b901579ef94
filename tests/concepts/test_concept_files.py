"""Concept images come in checked and byte for byte, or not at all."""

from __future__ import annotations

import pytest
from PIL import Image

from personalize_core.concepts import concept_files
from personalize_core.concepts.concept_files import add_concept, concept_images, read_concept
from personalize_core.errors import InputError
from tests.mutated import outcomes, put


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "my-dog"
    folder.mkdir()
    for number, size in enumerate([(20, 10), (10, 20), (8, 8)]):
        Image.new("RGB", size, (40 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def concepts(tmp_path):
    return tmp_path / "data" / "concepts"


def refusal(concepts, photos, class_noun="dog", name=None) -> str:
    """The one sentence, after checking that nothing was written."""
    before = sorted(concepts.rglob("*")) if concepts.exists() else []
    with pytest.raises(InputError) as refused:
        add_concept(concepts, photos, class_noun, name)
    assert (sorted(concepts.rglob("*")) if concepts.exists() else []) == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_concept_images_are_copied_byte_for_byte_and_described(photos, concepts):
    originals = {path.name: path.read_bytes() for path in photos.iterdir()}
    concept = add_concept(concepts, photos, "dog")
    assert (concept.name, concept.placeholder, concept.class_noun) == ("my-dog", "<my-dog>", "dog")
    kept = {path.name: path.read_bytes() for path in (concepts / "my-dog").iterdir()}
    assert kept.pop("concept.yaml")
    assert kept == originals == {path.name: path.read_bytes() for path in photos.iterdir()}
    assert [path.name for path in concepts.iterdir()] == ["my-dog"]


@pytest.mark.parametrize("class_noun", ["dog", "stuffed animal", "no", "null", "On", "rock'n'roll star"])
def test_what_was_written_is_read_back_even_if_yaml_has_another_meaning_for_it(class_noun, photos, concepts):
    assert add_concept(concepts, photos, class_noun, "x") == read_concept(concepts / "x")


def test_the_concept_images_are_found_again(photos, concepts):
    add_concept(concepts, photos, "dog")
    assert [path.name for path in concept_images(concepts / "my-dog")] == ["0.png", "1.png", "2.png"]


def test_the_content_follows_every_file_and_the_description(photos, concepts):
    add_concept(concepts, photos, "dog")
    before = concept_files.content(concepts / "my-dog")
    assert sorted(before) == ["0.png", "1.png", "2.png", "concept.yaml"]
    Image.new("RGB", (8, 8), (1, 1, 1)).save(concepts / "my-dog" / "2.png")
    changed = concept_files.content(concepts / "my-dog")
    assert [name for name in before if changed[name] != before[name]] == ["2.png"]


def test_texts_and_hidden_files_beside_the_images_are_left_behind(photos, concepts):
    for name in ("README.md", "license.txt", ".DS_Store"):
        (photos / name).write_text("something")
    add_concept(concepts, photos, "dog")
    assert len(list((concepts / "my-dog").iterdir())) == 4


# -- what is refused -------------------------------------------------------------------------------------------


def masks_for(photos, names=("0", "1", "2")):
    (photos / "masks").mkdir()
    for path in photos.glob("*.png"):
        if path.stem in names:
            with Image.open(path) as photo:
                Image.new("L", photo.size, 255).save(photos / "masks" / path.name)


def test_masks_beside_the_concept_images_come_along(photos, concepts):
    masks_for(photos)
    add_concept(concepts, photos, "dog")
    copied = {path.name: path.read_bytes() for path in (concepts / "my-dog" / "masks").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in (photos / "masks").iterdir()} and len(copied) == 3


def test_masks_of_some_concept_images_alone_are_refused(photos, concepts):
    masks_for(photos, ("0", "1"))
    assert "masks lacks 2.png; put a mask there for each concept image, or take them all out" in refusal(
        concepts, photos
    )


def test_a_folder_that_is_not_there_or_no_folder(photos, concepts):
    for path in (photos / "none", photos / "0.png"):
        assert refusal(concepts, path) == f"{path} is no folder; give the folder that holds the concept's images"


def test_a_folder_without_images(tmp_path, concepts):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.txt").write_text("no image")
    said = refusal(concepts, tmp_path / "bare")
    assert said.startswith(f"{tmp_path / 'bare'} holds no concept images; put some there as .avif, .bmp")


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "is empty"), (b"GIF89a and no more", "cannot be read"), (b"hello", "cannot be read")]
)
def test_a_image_that_cannot_be_read(content, what, photos, concepts):
    (photos / "7.jpg").write_bytes(content)
    said = refusal(concepts, photos)
    assert said.startswith(f"{photos / '7.jpg'} {what}") and said.endswith("replace it or take it out of the folder")


def test_a_image_that_is_only_half_there(photos, concepts):
    whole = (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes(whole[: len(whole) // 2])
    assert "0.png cannot be read as an image" in refusal(concepts, photos)


def test_a_file_that_may_have_been_meant_as_a_image(photos, concepts):
    (photos / "4.heic").write_bytes(b"something")
    assert refusal(concepts, photos) == (f"{photos} also holds 4.heic, no image by name; take it out or rename it")


def test_a_image_too_large_to_decode(photos, concepts, monkeypatch):
    monkeypatch.setattr(concept_files, "MOST_PIXELS", 150)
    assert refusal(concepts, photos) == (f"{photos / '0.png'} has 20 x 10 pixels; make it smaller than 100 megapixels")


def test_a_name_that_is_not_plain(photos, concepts):
    assert "'My Dog' cannot be a concept's name" in refusal(concepts, photos, name="My Dog")
    awkward = photos.rename(photos.with_name("My Dog"))
    assert "'My Dog' cannot be a concept's name" in refusal(concepts, awkward)


def test_a_class_noun_that_is_not_plain(photos, concepts):
    assert "'dog7!' cannot be a class noun" in refusal(concepts, photos, class_noun="dog7!")


def test_a_name_that_is_taken(photos, concepts):
    add_concept(concepts, photos, "dog")
    assert refusal(concepts, photos, "cat") == (
        f"the concept 'my-dog' exists already; choose another --name, or remove {concepts / 'my-dog'} first"
    )
    assert read_concept(concepts / "my-dog").class_noun == "dog"


def test_a_copy_that_fails_leaves_nothing(photos, concepts, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(concept_files.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="no space"):
        add_concept(concepts, photos, "dog")
    assert list(concepts.iterdir()) == []


def test_a_folder_without_its_description(photos):
    with pytest.raises(
        InputError, match="my-dog holds no concept.yaml; write one there.*or add concept images with `personalize add`"
    ):
        read_concept(photos)


@pytest.mark.parametrize(
    "text", ["", "dog", "[1, 2]", "placeholder: <x>", "placeholder: <x>\nclass_noun: dog\nmore: 1"]
)
def test_a_description_that_says_something_else(text, photos):
    (photos / "concept.yaml").write_bytes(text.encode())
    with pytest.raises(InputError) as refused:
        read_concept(photos)
    assert str(refused.value) == (
        f"{photos / 'concept.yaml'} must hold two lines, 'placeholder: <my-dog>' and 'class_noun: NOUN'"
    )


@pytest.mark.parametrize(
    "content, said",
    [
        (b"a: {", "concept.yaml is not YAML"),
        (b"\xe9", "concept.yaml is not text in UTF-8"),
        (b"placeholder: <x>\nclass_noun: dog\nclass_noun: cat", "line 3: the key 'class_noun' stands there twice"),
        (b"placeholder: [<x>]\nclass_noun: dog", "placeholder = ['<x>']: it should be a word"),
        (b"[" * 1000, "64 levels"),
    ],
)
def test_a_description_that_cannot_be_read(content, said, photos):
    (photos / "concept.yaml").write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_concept(photos)
    assert said in str(refused.value)


def test_a_mutated_description_is_read_or_refused(photos):
    def read(content: bytes) -> object:
        put(photos / "concept.yaml", content)
        return read_concept(photos)

    accepted, refused = outcomes(b'placeholder: "<my-dog>"\nclass_noun: stuffed animal\n', read)
    assert accepted > 100 and refused > 500
