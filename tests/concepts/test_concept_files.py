"""Concept images come in checked and byte for byte, or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from personalize_core.concepts import concept_files
from personalize_core.concepts.concept_files import (
    Named,
    add_concept,
    by_kohya,
    concept_images,
    left_out,
    read_concept,
)
from personalize_core.errors import InputError
from personalize_core.files import atomic
from tests.concepts.test_image_files import grey_png
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


def test_what_systems_and_trainers_write_beside_the_images_is_left_behind_and_named(photos, concepts):
    masks_for(photos)
    for name in ("README.md", "0.txt", "0.caption", "0.npz", "meta.json", "Thumbs.db", "desktop.ini", "masks/9.png"):
        (photos / name).write_text("something")
    for name in (".DS_Store", "._0.png"):  # hidden files are not worth a word
        (photos / name).write_text("something")
    (photos / "raw").mkdir()
    add_concept(concepts, photos, "dog")
    kept = sorted(path.relative_to(concepts / "my-dog").as_posix() for path in (concepts / "my-dog").rglob("*.*"))
    assert kept == ["0.png", "1.png", "2.png", "concept.yaml", "masks/0.png", "masks/1.png", "masks/2.png"]
    assert left_out(photos) == [
        *("0.caption", "0.npz", "0.txt", "README.md", "Thumbs.db", "desktop.ini", "masks/9.png", "meta.json", "raw")
    ]


def test_the_folder_that_kohyas_trainer_reads_gives_name_and_class_noun(photos, concepts):
    folder = photos.rename(photos.with_name("10_Rex stuffed animal"))
    assert by_kohya(folder) == Named(10, "rex", "stuffed animal")
    assert add_concept(concepts, folder) == read_concept(concepts / "rex")
    assert read_concept(concepts / "rex").class_noun == "stuffed animal"
    assert add_concept(concepts, folder, "dog", "fido") == read_concept(concepts / "fido")  # what is given counts
    assert (read_concept(concepts / "fido").name, read_concept(concepts / "fido").class_noun) == ("fido", "dog")


def test_without_a_class_noun_nothing_is_added(photos, concepts):
    with pytest.raises(InputError, match="give the class noun, .*: --class-noun dog"):
        add_concept(concepts, photos)
    assert not concepts.exists() and by_kohya(photos) is None


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


def test_a_folder_whose_folders_hold_the_images(photos, concepts):
    said = refusal(concepts, photos.parent)
    assert said == (
        f"{photos.parent} holds no concept images, but its folders do: my-dog; give the folder that holds the images, "
        f"such as {photos}"
    )


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
    for name in ("4.heic", "5.HEIC", "notes.pages"):
        (photos / name).write_bytes(b"something")
    assert refusal(concepts, photos) == (
        f"{photos} also holds files that cannot be read as images. 4.heic and 5.HEIC: convert to JPEG (`heif-convert "
        "IN.heic OUT.jpg`, or export as JPEG from a photo program); notes.pages: move out of the folder, or, if it is "
        "an image, give the name its format's ending, such as .jpg"
    )


def test_a_image_too_large_to_decode(photos, concepts):
    (photos / "0.png").write_bytes(grey_png(11_000, 10_000, b""))
    assert refusal(concepts, photos) == (
        f"{photos / '0.png'} has 11,000 x 10,000 pixels; make it smaller than 100 megapixels"
    )


def test_a_link_among_the_images_that_leads_nowhere(photos, concepts):
    os.symlink(photos / "moved.png", photos / "7.png")
    assert refusal(concepts, photos).startswith(f"{photos / '7.png'} is a link that leads nowhere")


def test_a_name_that_is_not_utf8(photos, concepts):
    os.rename(os.fsencode(photos / "0.png"), os.fsencode(photos) + b"/\xe9.png")
    assert refusal(concepts, photos) == f"{photos}/\\udce9.png has a name that is not UTF-8; rename it"


def test_a_path_that_no_file_can_have(photos, concepts):
    assert "cannot be opened: File name too long" in refusal(concepts, photos / ("x" * 300))


@pytest.mark.parametrize("where", ["0.png", "masks/0.png"])
def test_a_fifo_or_device_is_never_waited_for(where, photos, concepts):
    masks_for(photos)
    (photos / where).unlink()
    os.mkfifo(photos / where)
    assert f"{photos / where} is" in refusal(concepts, photos)
    (photos / where).unlink()
    os.symlink("/dev/zero", photos / where)
    assert f"{photos / where} is" in refusal(concepts, photos)


def test_a_mask_of_another_size(photos, concepts):
    masks_for(photos)
    Image.new("L", (9, 9)).save(photos / "masks" / "1.png")
    assert refusal(concepts, photos) == (
        f"{photos / 'masks' / '1.png'} has 9 x 9 pixels and 1.png 10 x 20; make the mask as large"
    )


def test_a_name_that_is_not_plain(photos, concepts):
    assert "'My Dog' cannot be a concept's name" in refusal(concepts, photos, name="My Dog")
    awkward = photos.rename(photos.with_name("My Dog"))
    assert "'My Dog' cannot be a concept's name" in refusal(concepts, awkward)


def test_a_class_noun_that_is_not_plain(photos, concepts):
    assert "'dog7!' cannot be a class noun" in refusal(concepts, photos, class_noun="dog7!")


def test_a_name_that_is_taken(photos, concepts):
    add_concept(concepts, photos, "dog")
    assert refusal(concepts, photos, "cat") == (
        f"the concept 'my-dog' exists already; choose another --name, or move {concepts / 'my-dog'} elsewhere first"
    )
    assert read_concept(concepts / "my-dog").class_noun == "dog"


def test_images_that_lie_where_concepts_are_kept_need_a_description_alone(photos, concepts):
    """They may be the only originals: nothing may advise to remove them, and what is advised must work."""
    concepts.mkdir(parents=True)
    folder = photos.rename(concepts / "my-dog")
    said = refusal(concepts, folder)
    assert said == (
        f"{folder} is where concepts are kept, and lacks only its description: write {folder / 'concept.yaml'} with "
        "two lines, 'placeholder: \"<my-dog>\"' and 'class_noun: dog'"
    )
    (folder / "concept.yaml").write_text("\n".join(said.split("'")[1::2]))
    assert read_concept(folder).class_noun == "dog" and len(concept_images(folder)) == 3
    assert refusal(concepts, folder) == f"{folder} is the concept 'my-dog' already; there is nothing to add"


@pytest.mark.parametrize("what", ["a folder", "an empty folder", "a file", "a link that leads nowhere"])
def test_a_name_that_something_else_has(what, photos, concepts):
    concepts.mkdir(parents=True)
    taken = concepts / "my-dog"
    if what == "a file":
        taken.write_text("mine")
    elif what == "a link that leads nowhere":
        os.symlink(photos / "nowhere", taken)
    else:
        taken.mkdir()
        if what == "a folder":
            (taken / "original.png").write_bytes(b"mine")
    assert refusal(concepts, photos) == (
        f"{taken} exists already, though it is no concept: it has no concept.yaml; choose another --name, or move it "
        "elsewhere first"
    )


def test_of_two_at_once_one_is_added_and_the_other_refused(photos, concepts, monkeypatch):
    """Both have found the name free, and have copied everything, before either renames its copy."""
    ready, plain = threading.Barrier(2), os.rename

    def rename(*paths):
        ready.wait(60)
        plain(*paths)

    monkeypatch.setattr(atomic.os, "rename", rename)
    with ThreadPoolExecutor(2) as pool:
        errors = [one.exception() for one in [pool.submit(add_concept, concepts, photos, noun) for noun in "ab"]]
    monkeypatch.undo()
    (error,) = [error for error in errors if error]
    assert isinstance(error, InputError) and "the concept 'my-dog' exists already" in str(error)
    assert read_concept(concepts / "my-dog").class_noun == "ab"[errors.index(None)]
    assert len(concept_images(concepts / "my-dog")) == 3 and [path.name for path in concepts.iterdir()] == ["my-dog"]


def test_what_an_add_that_was_killed_has_left_goes_with_the_next_one(photos, concepts):
    program = f"""if True:
        import os, signal
        from pathlib import Path
        from personalize_core.concepts.concept_files import add_concept
        os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        add_concept(Path({str(concepts)!r}), Path({str(photos)!r}), "dog")
    """
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    (left,) = concepts.iterdir()
    assert left.name.startswith(".") and (left / "0.png").is_file()
    add_concept(concepts, photos, "dog")
    assert [path.name for path in concepts.iterdir()] == ["my-dog"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs to know what a descriptor is of")
def test_all_is_on_the_disk_before_it_has_its_name(photos, concepts, monkeypatch):
    masks_for(photos)
    done: list[str] = []
    plain_sync, plain_rename = os.fsync, os.rename

    def sync(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        plain_sync(descriptor)

    def rename(*paths):
        done.append("renamed")
        plain_rename(*paths)

    monkeypatch.setattr(atomic.os, "fsync", sync)
    monkeypatch.setattr(atomic.os, "rename", rename)
    add_concept(concepts, photos, "dog")
    before, after = done[: done.index("renamed")], done[done.index("renamed") + 1 :]
    images = [f"{number}.png" for number in range(3)]
    assert sorted(before[:-1]) == sorted([*images, *images, "masks", "concept.yaml"]) and before[-1].endswith(".tmp")
    assert after == ["concepts"]


def test_a_copy_that_fails_leaves_nothing(photos, concepts, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space"):
        add_concept(concepts, photos, "dog")
    assert list(concepts.iterdir()) == []


def test_a_place_that_cannot_be_written(photos, concepts, monkeypatch):
    def fail(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", fail)
    concepts.mkdir(parents=True)
    said = refusal(concepts, photos)
    assert said == f"{concepts}, where concepts are kept, cannot be written: Read-only file system"


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
