"""Folders become partitions when they are whole, wherever they arrive; what is wrong is said where people look."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import dagster as dg
import fsspec
import pytest
from PIL import Image

from personalize_core.concepts import concept_files
from personalize_core.errors import InputError
from personalize_core.workspace import arrival as core
from personalize_core.workspace.store import Store
from pipelines.automation import arrival
from pipelines.automation.requests import THEN
from pipelines.resources import Workspace
from tests.concepts.test_image_files import grey_png
from tests.watching import Watch, choose, complaints, concept, reported, skipped


@pytest.fixture
def watch(tmp_path):
    with dg.DagsterInstance.ephemeral() as instance:
        yield Watch(instance, tmp_path)


@pytest.fixture
def concepts(tmp_path) -> Path:
    return tmp_path / "data" / "concepts"


def test_a_new_folder_becomes_a_partition_once_it_has_settled(watch, concepts):
    folder = concept(concepts, "dog7")
    assert skipped(watch.tick())
    Image.new("RGB", (64, 64)).save(folder / "01.png")  # still being copied
    assert skipped(watch.tick())
    assert watch.known() == set()
    assert reported(watch.tick()) == ["dog7"]
    assert watch.known() == {"dog7"}
    assert skipped(watch.tick())


def test_touching_a_file_reports_nothing_and_changing_it_does(watch, concepts):
    folder = concept(concepts, "dog7")
    watch.twice()
    os.utime(folder / "00.png", (1, 1))
    assert skipped(watch.twice())
    Image.new("RGB", (64, 64), "blue").save(folder / "00.png")
    assert reported(watch.twice()) == ["dog7"]


@pytest.mark.parametrize("damaged", ["[]", "null", '{"dog7": "why"}', '{"dog7": {"state": "s"}}', "{"])
def test_a_damaged_list_of_what_could_not_be_brought_stops_nothing(tmp_path, damaged):
    store, place = Store(tmp_path / "here"), tmp_path / "there"
    concept(place, "dog7")
    store.work(core.REFUSED).parent.mkdir(parents=True)
    store.work(core.REFUSED).write_text(damaged)
    assert core.refusals(store) == {}
    there = core.listing(str(place))
    core.bring(store, str(place), there, gone=[])
    assert store.concept_names() == ["dog7"] and core.refusals(store) == {}


def test_a_mask_is_part_of_the_content(watch, concepts):
    folder = concept(concepts, "dog7")
    watch.twice()
    (folder / "masks").mkdir()
    Image.new("L", (64, 64), 255).save(folder / "masks" / "00.png")
    assert reported(watch.twice()) == ["dog7"]


def test_a_folder_that_is_gone_on_two_looks_is_no_partition(watch, concepts):
    folder = concept(concepts, "dog7")
    watch.twice()
    folder.rename(watch.root / "elsewhere")
    watch.tick()
    assert watch.known() == {"dog7"}  # it may be about to be replaced
    watch.tick()
    assert watch.known() == set()
    (watch.root / "elsewhere").rename(folder)
    assert reported(watch.twice()) == ["dog7"]


def test_a_removed_concept_is_taken_out_of_the_comparison(watch, concepts):
    folder = concept(concepts, "dog7")
    watch.twice()
    (watch.root / "data" / "comparison").mkdir()
    shutil.rmtree(folder)
    assert [request.job_name for request in watch.twice().run_requests or []] == ["compare"]


def test_after_a_restart_it_goes_on_from_its_cursor(watch, concepts):
    concept(concepts, "dog7")
    concept(concepts, "cat2", shade=9)
    watch.tick()
    again = Watch(watch.instance, watch.root)
    again.cursor = watch.cursor
    assert reported(again.tick()) == ["cat2", "dog7"]
    assert skipped(again.tick())


def test_a_tick_that_is_evaluated_twice_asks_for_the_same(watch, concepts):
    """A daemon that dies between a tick and its cursor evaluates it again; the keys keep its runs single."""
    choose(watch.root, continuous=True)
    concept(concepts, "dog7")
    watch.tick()
    cursor, keys = watch.cursor, []
    for _ in range(2):
        watch.cursor = cursor
        keys.append([request.run_key for request in watch.tick().run_requests or []])
    assert keys[0] == keys[1] and len(keys[0]) == 1


# What cannot be used


@pytest.mark.parametrize("name", ["Dog 7", "a|b", "dog...7"])
def test_a_folder_whose_name_is_no_concept_is_reported_and_left_out(watch, concepts, name):
    (concepts / name).mkdir(parents=True)
    result = watch.twice()
    assert repr(name) in (complaints(result)[name] or "")
    assert watch.known() == set()


def spoil_concept_image(folder: Path) -> None:
    content = (folder / "00.png").read_bytes()
    (folder / "00.png").write_bytes(content[: len(content) // 2])


def without_concept_images(folder: Path) -> None:
    (folder / "00.png").unlink()


def without_description(folder: Path) -> None:
    (folder / "concept.yaml").unlink()


def damage_description(folder: Path) -> None:
    (folder / "concept.yaml").write_text("class_noun: [")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_concept_image, "00.png"),
        (without_concept_images, "holds no concept images"),
        (without_description, "holds no concept.yaml"),
        (damage_description, "concept.yaml is not YAML"),
    ],
)
def test_a_folder_that_fails_the_gate_is_reported_stops_no_other_and_counts_when_corrected(
    watch, concepts, tmp_path, spoil, reason
):
    whole = concept(tmp_path / "kept", "dog7", shade=3)
    spoil(concept(concepts, "dog7", shade=3))
    concept(concepts, "cat2", shade=200)
    first = watch.tick()
    assert complaints(first) == {}  # it may still be being copied
    second = watch.tick()
    assert reported(second) == ["cat2"] and watch.known() == {"cat2"}
    assert reason in (complaints(second)["dog7"] or "")
    verdict = watch.verdict()
    assert verdict and not verdict.passed and "dog7" in (verdict.description or "")
    assert reason in str(verdict.metadata["reasons"].value)
    assert watch.tick().asset_events == []  # said once

    shutil.rmtree(concepts / "dog7")
    shutil.copytree(whole, concepts / "dog7")
    assert reported(watch.twice()) == ["dog7"]
    assert watch.known() == {"cat2", "dog7"}
    verdict = watch.verdict()
    assert verdict and verdict.passed


DESCRIBED = 'placeholder: "<{name}>"\nclass_noun: dog\n'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop\n"
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefgh")
)
NOTHING_IS_THERE = "holds no concept images"


def image(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def description(text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "concept.yaml").write_bytes(text.encode() if isinstance(text, str) else text)


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in the place of a file, or where there was none."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        make(folder / name)

    return spoil


def link(to: str) -> Callable[[Path], object]:
    return lambda path: os.symlink(to, path)


def mask(size: tuple[int, int] | None, name: str = "00.png") -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / "masks").mkdir()
        Image.new("L", size).save(folder / "masks" / name) if size else (folder / "masks" / name).touch()

    return spoil


def not_utf8(folder: Path) -> None:
    (folder / "00.png").rename(os.fsdecode(os.fsencode(folder) + b"/\xe9.png"))


def exif_alone(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "00.png", exif=b"Exif\0\0no EXIF at all")


def float_tiff(folder: Path) -> None:
    Image.new("F", (64, 64), 0.5).save(folder / "01.tif")


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "half-an-image": (spoil_concept_image, "00.png cannot be read"),
    "empty-image": (image("01.jpg", b""), "01.jpg is empty"),
    "text-image": (image("01.jpg", b"hello"), "01.jpg cannot be read"),
    "eps-image": (image("01.jpg", EPS), "01.jpg cannot be read"),
    "spider-image": (image("01.png", b"\0\0\0\x01" * 3000), "01.png cannot be read"),
    "dds-image": (image("01.png", b"DDS " + b"\x7c" + bytes(200)), "01.png cannot be read"),
    "avif-image": (image("01.png", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(99)), "01.png cannot be read"),
    "heic-image": (image("01.heic", b"x"), "01.heic: convert to JPEG"),
    "raw-image": (image("01.CR2", b"x"), "01.CR2: export as JPEG"),
    "archive": (image("more.zip", b"PK"), "more.zip"),
    "lfs-image": (image("01.png", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "narrow-image": (image("01.png", grey_png(8, 1000)), "8 x 1,000 pixels"),
    "tiny-image": (image("01.png", grey_png(1, 3)), "1 x 3 pixels"),
    "long-image": (image("01.png", grey_png(1, 30_000)), "1 x 30,000 pixels"),
    "large-image": (image("01.png", grey_png(60_000, 60_000, b"")), "has too many pixels"),
    "wrong-checksum": (image("01.png", grey_png(64, 64)[:-20] + b"x" + grey_png(64, 64)[-19:]), "checksum"),
    "float-image": (float_tiff, "black and white"),
    "exif-damaged": (exif_alone, "EXIF"),
    "fifo-image": (instead("01.jpg", os.mkfifo), "01.jpg is no regular file"),
    "device-image": (instead("01.jpg", link("/dev/zero")), "01.jpg is no regular file"),
    "lost-image": (instead("01.jpg", link("/nowhere/01.jpg")), "01.jpg is a link that leads nowhere"),
    "loop-image": (instead("01.jpg", link("01.jpg")), "01.jpg is a link that leads nowhere"),
    "latin1-image": (not_utf8, "has a name that is not UTF-8"),
    "no-images": (without_concept_images, NOTHING_IS_THERE),
    "folder-image": (instead("00.png", Path.mkdir), NOTHING_IS_THERE),
    "fifo-mask": (instead("masks/00.png", os.mkfifo), "00.png is a FIFO"),
    "device-mask": (instead("masks/00.png", link("/dev/zero")), "00.png is a device"),
    "damaged-mask": (mask(None), "00.png is empty"),
    "small-mask": (mask((9, 9)), "has 9 x 9 pixels and 00.png 64 x 64"),
    "other-mask": (mask((64, 64), "01.png"), "masks lacks 00.png"),
    "undescribed": (without_description, "holds no concept.yaml"),
    "damaged-text": (damage_description, "concept.yaml is not YAML"),
    "empty-text": (description(""), "must hold two lines"),
    "other-keys": (description("name: x"), "must hold two lines"),
    "key-twice": (description(DESCRIBED.format(name="x") + "class_noun: cat"), "stands there twice"),
    "latin1-text": (description(b"class_noun: \xe9"), "is not text in UTF-8"),
    "deep-text": (description("[" * 1000), "64 levels"),
    "deepest-text": (description("[" * 100_000), "64 levels"),
    "laughs": (description(LAUGHS + "\nplaceholder: *h"), "anchors and aliases"),
    "large-text": (description("# " + "x" * 5_000_000), "bytes"),
    "list-noun": (description('placeholder: "<x>"\nclass_noun: [dog]'), "it should be a word"),
    "odd-placeholder": (description("placeholder: x\nclass_noun: dog"), "cannot be a placeholder"),
    "odd-noun": (description('placeholder: "<x>"\nclass_noun: dog7'), "cannot be a class noun"),
    "fifo-text": (instead("concept.yaml", os.mkfifo), "concept.yaml is a FIFO"),
    "device-text": (instead("concept.yaml", link("/dev/zero")), "concept.yaml is a device"),
    "lost-text": (instead("concept.yaml", link("/nowhere")), "does not exist"),
    "loop-text": (instead("concept.yaml", link("concept.yaml")), "concept.yaml"),
    "folder-text": (instead("concept.yaml", Path.mkdir), "concept.yaml is a folder"),
}


def spoil_all(place: Path) -> dict[str, str]:
    """A folder of each kind that cannot be used, and what has to be said of it; and two good ones, first and last."""
    for name in ("a-good-one", "z-good-one"):
        concept(place, name)
    for name, (spoil, _) in SPOILED.items():
        spoil(concept(place, name))
    concept(place, "renamed").rename(os.fsdecode(os.fsencode(place) + b"/dog\xe9"))
    return {name: said for name, (_, said) in SPOILED.items()} | {"dog\\udce9": "cannot be a concept's name"}


def test_whatever_is_wrong_with_a_folder_is_its_own_reason_and_the_others_count(watch, concepts):
    expected = spoil_all(concepts)
    result = watch.twice()
    assert sorted(map(str, reported(result))) == ["a-good-one", "z-good-one"] == sorted(watch.known())
    found = complaints(result)
    assert found.keys() == expected.keys()
    assert {name: said for name, said in expected.items() if said not in str(found[name])} == {}
    assert skipped(watch.tick()) and watch.tick().asset_events == []  # nothing changes by being looked at


@pytest.mark.parametrize("error", [RecursionError, MemoryError, struct.error, AssertionError])
def test_what_nobody_expected_is_a_reason_too(watch, concepts, error, monkeypatch):
    concept(concepts, "dog7")
    concept(concepts, "cat2", shade=9)
    plain = concept_files.check_folder

    def check(folder):
        if folder.name == "dog7":
            raise error("something odd")
        return plain(folder)

    monkeypatch.setattr(concept_files, "check_folder", check)
    result = watch.twice()
    assert reported(result) == ["cat2"]
    assert f"dog7 cannot be read: {error.__name__}: something odd" in (complaints(result)["dog7"] or "")


def test_whatever_is_wrong_elsewhere_is_the_reason_of_its_folder_and_the_others_are_brought(tmp_path):
    store, place = Store(tmp_path / "here"), tmp_path / "there"
    expected = spoil_all(place)
    for _ in range(2):
        there = core.listing(str(place))
        core.bring(store, str(place), there, gone=[])
        assert store.concept_names() == ["a-good-one", "z-good-one"]
        found = core.refusals(store)
        assert found.keys() == expected.keys()
    assert [path.name for path in store.concepts.iterdir() if path.name.startswith(".")] == []
    assert "is no regular file" in found["fifo-image"] and "is no regular file" in found["fifo-text"]
    assert "is a link that leads out of" in found["device-image"] and "leads out of" in found["device-text"]
    assert "01.jpg: convert" not in found["heic-image"] and "01.heic: convert to JPEG" in found["heic-image"]


def test_folders_within_each_other_do_not_matter_however_many(tmp_path):
    store, place = Store(tmp_path / "here"), tmp_path / "there"
    deep = [concept(place, "dog7") / "notes"]
    deep[0].mkdir()
    while len(deep) < 1200:
        deep.append(deep[-1] / "d")
        os.mkdir(deep[-1])
    try:
        there = core.listing(str(place))
        core.bring(store, str(place), there, gone=[])
        assert store.concept_names() == ["dog7"] and core.refusals(store) == {}
    finally:
        for folder in reversed(deep):
            os.rmdir(folder)


def test_a_link_of_a_folder_that_arrives_is_followed_within_the_place_alone(tmp_path):
    store, place = Store(tmp_path / "here"), tmp_path / "there"
    for name, target in (("inside", place / "pool" / "a.png"), ("outside", tmp_path / "private.png")):
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(target)
        os.symlink(target, concept(place, name) / "01.png")
    there = core.listing(str(place))
    core.bring(store, str(place), there, gone=[])
    assert store.concept_names() == ["inside"]
    assert "is a link that leads out of" in core.refusals(store)["outside"]


def test_a_concept_that_is_damaged_later_keeps_its_partition_and_its_last_version(watch, concepts):
    folder = concept(concepts, "dog7")
    watch.twice()
    damage_description(folder)
    result = watch.twice()
    assert reported(result) == [] and "dog7" in complaints(result)
    assert watch.known() == {"dog7"}


def test_the_check_can_be_run_by_hand(watch, concepts):
    spoil_concept_image(concept(concepts, "dog7"))
    workspace = {"workspace": Workspace(root=str(watch.root))}
    result = arrival.folders_usable(**workspace)
    assert isinstance(result, dg.AssetCheckResult) and not result.passed
    assert "00.png" in str(result.metadata["reasons"].value)


def test_a_damaged_params_file_is_said_and_stops_no_arrival_here(watch, concepts):
    (watch.root / "params.yaml").write_text("automation: { arival: x }")
    concept(concepts, "dog7")
    assert reported(watch.twice()) == ["dog7"]
    verdict = watch.verdict()
    assert verdict and "params.yaml" in (verdict.description or "")
    assert "'base_model' is missing" in str(verdict.metadata["reasons"].value)


def test_the_sensor_and_the_core_mean_the_same_concepts(concepts, tmp_path):
    concept(concepts, "dog7")
    (concepts / ".half.tmp").mkdir()
    assert list(core.look(Store(tmp_path))) == Store(tmp_path).concept_names()


def test_what_is_added_by_hand_is_a_partition_too(watch, concepts, tmp_path):
    photos = tmp_path / "photos" / "rex"
    photos.mkdir(parents=True)
    Image.new("RGB", (40, 30), "green").save(photos / "a.jpg")
    concept_files.add_concept(concepts, photos, "dog")
    watch.twice()
    assert watch.known() == {"rex"}


# The continuous mode


def test_in_continuous_mode_what_has_settled_is_prepared_and_trained_at_once(watch, concepts):
    choose(watch.root, continuous=True)
    folder = concept(concepts, "dog7")
    assert not watch.tick().run_requests
    (request,) = watch.tick().run_requests or []
    assert (request.job_name, request.partition_key, request.tags[THEN]) == ("prepare", "dog7", "learn")
    assert not watch.tick().run_requests
    before = (folder / "00.png").read_bytes()
    keys = {request.run_key}
    Image.new("RGB", (64, 64), "blue").save(watch.root / "blue.png")
    for content in ((watch.root / "blue.png").read_bytes(), before):  # there and back: it must be trained again
        (folder / "00.png").write_bytes(content)
        requests = watch.twice().run_requests or []
        keys |= {request.run_key for request in requests if request.partition_key == "dog7"}
    assert len(keys) == 3


def test_a_cursor_that_a_person_reset_asks_under_new_keys(watch, concepts):
    """Dagster drops, for ever, a request with a key that this sensor has used before."""
    choose(watch.root, continuous=True)
    concept(concepts, "dog7")
    (first,) = watch.twice().run_requests or []
    watch.cursor = None
    (second,) = watch.twice().run_requests or []
    assert first.run_key != second.run_key


def test_otherwise_nothing_runs_on_arrival(watch, concepts):
    choose(watch.root)
    concept(concepts, "dog7")
    watch.tick()
    assert not watch.tick().run_requests
    assert watch.known() == {"dog7"}


# Where concepts arrive elsewhere


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """An S3 server on the loopback address, which the environment names as users name theirs."""
    server_of = pytest.importorskip("moto.server", reason="moto is not installed; `make install` installs it")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed; `make install` installs it")
    server = server_of.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    address, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{address}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "of-the-test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    s3fs.S3FileSystem.clear_instance_cache()  # it would go on asking this server
    server.stop()


@pytest.fixture(params=["local", "memory", "s3"])
def location(request, tmp_path):
    """A place where concepts arrive: its address, and the way to put a folder there or take it away."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    name = "".join(letter for letter in tmp_path.name if letter.isalnum()).lower()
    addresses = {"local": tmp_path / "incoming", "memory": f"memory://incoming-{name}", "s3": f"s3://in-{name}"}
    place = Location(str(addresses[request.param]))
    place.system.makedirs(place.root, exist_ok=True)
    yield place
    place.system.rm(place.root, recursive=True)


class Location:
    def __init__(self, address: str) -> None:
        self.address = address
        self.system, self.root = fsspec.url_to_fs(address)

    def put(self, folder: Path) -> None:
        self.take(folder.name)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                there = f"{self.root}/{folder.name}/{path.relative_to(folder).as_posix()}"
                self.system.makedirs(there.rsplit("/", 1)[0], exist_ok=True)
                self.system.pipe_file(there, path.read_bytes())

    def take(self, name: str) -> None:
        if self.system.exists(f"{self.root}/{name}"):
            self.system.rm(f"{self.root}/{name}", recursive=True)

    def content(self) -> dict[str, bytes]:
        return {path: self.system.cat_file(path) for path in self.system.find(self.root)}


@pytest.fixture
def elsewhere(watch, location):
    choose(watch.root, arrival=location.address)
    return location


def test_what_arrives_elsewhere_is_brought_whole_and_the_originals_stay(watch, concepts, elsewhere, tmp_path):
    own = concept(tmp_path / "own", "dog7")
    (own / "masks").mkdir()
    Image.new("L", (64, 64), 255).save(own / "masks" / "00.png")
    (own / "notes").mkdir()
    (own / "notes" / "x.txt").write_text("not a part of a concept")
    elsewhere.put(own)
    originals = elsewhere.content()
    watch.tick()
    assert not (concepts / "dog7").exists()  # it may be being copied there
    watch.tick()
    brought = {path.relative_to(concepts / "dog7").as_posix() for path in (concepts / "dog7").rglob("*.*")}
    assert brought == {"00.png", "concept.yaml", "masks/00.png", core.RECORD}
    assert (concepts / "dog7" / "00.png").read_bytes() == (own / "00.png").read_bytes()
    watch.tick()
    assert watch.known() == {"dog7"}
    assert elsewhere.content() == originals
    assert [path.name for path in concepts.iterdir()] == ["dog7"]


def test_what_changes_elsewhere_replaces_what_was_brought(watch, concepts, elsewhere, tmp_path):
    elsewhere.put(concept(tmp_path / "old", "dog7"))
    [watch.tick() for _ in range(3)]
    elsewhere.put(concept(tmp_path / "new", "dog7", shade=77))
    results = [watch.tick() for _ in range(3)]
    assert (concepts / "dog7" / "00.png").read_bytes() == (tmp_path / "new/dog7/00.png").read_bytes()
    assert [name for result in results for name in reported(result)] == ["dog7"]


def test_what_is_half_there_is_left_alone(watch, concepts, elsewhere, tmp_path):
    folder = concept(tmp_path / "own", "dog7")
    for number in range(1, 4):
        elsewhere.put(folder)
        watch.tick()
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number:02d}.png")
    assert not (concepts / "dog7").exists() and watch.known() == set()


def test_a_folder_that_changes_while_it_is_brought_is_left_for_the_next_look(
    watch, concepts, elsewhere, tmp_path, monkeypatch
):
    elsewhere.put(concept(tmp_path / "own", "dog7"))
    watch.tick()
    plain = core._files

    def changing(address):
        found = plain(address)
        elsewhere.put(concept(tmp_path / f"own{len(list(tmp_path.iterdir()))}", "dog7", shade=5))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(core, "_files", changing)
        watch.tick()
    assert not (concepts / "dog7").exists()
    [watch.tick() for _ in range(2)]
    assert (concepts / "dog7").exists()


def test_one_that_cannot_be_used_is_reported_not_brought_and_not_fetched_again(
    watch, concepts, elsewhere, tmp_path, monkeypatch
):
    bad = concept(tmp_path / "own", "dog7")
    spoil_concept_image(bad)
    elsewhere.put(bad)
    elsewhere.put(concept(tmp_path / "own", "cat2", shade=8))
    watch.tick()
    result = watch.tick()
    assert "00.png" in (complaints(result)["dog7"] or "") and elsewhere.address in (complaints(result)["dog7"] or "")
    watch.tick()
    assert watch.known() == {"cat2"} and not (concepts / "dog7").exists()
    verdict = watch.verdict()
    assert verdict and not verdict.passed
    with monkeypatch.context() as patch:
        patch.setattr(core, "_bring", lambda *arguments: pytest.fail("fetched again"))
        watch.tick()
    elsewhere.put(concept(tmp_path / "mended", "dog7"))
    [watch.tick() for _ in range(3)]
    assert watch.known() == {"cat2", "dog7"}
    verdict = watch.verdict()
    assert verdict and verdict.passed


def test_what_a_person_changed_here_is_not_replaced(watch, concepts, elsewhere, tmp_path):
    elsewhere.put(concept(tmp_path / "old", "dog7"))
    [watch.tick() for _ in range(3)]
    Image.new("RGB", (64, 64), "white").save(concepts / "dog7" / "00.png")
    mine = (concepts / "dog7" / "00.png").read_bytes()
    elsewhere.put(concept(tmp_path / "new", "dog7", shade=77))
    result = watch.twice()
    assert (concepts / "dog7" / "00.png").read_bytes() == mine
    assert "was changed here" in (complaints(result)["dog7"] or "")


def test_what_a_person_put_here_is_not_replaced_unless_it_is_the_same(watch, concepts, elsewhere, tmp_path):
    concept(concepts, "dog7", shade=1)
    concept(concepts, "cat2", shade=2)
    mine = (concepts / "dog7" / "00.png").read_bytes()
    elsewhere.put(concept(tmp_path / "new", "dog7", shade=77))
    elsewhere.put(concept(tmp_path / "new", "cat2", shade=2))
    result = watch.twice()
    assert (concepts / "dog7" / "00.png").read_bytes() == mine
    assert "was not brought from there" in (complaints(result)["dog7"] or "") and "cat2" not in complaints(result)
    assert core.brought(Store(watch.root), core.address_of(Store(watch.root), elsewhere.address) or "").keys() == {
        "cat2"
    }


def test_what_is_gone_elsewhere_goes_here_and_can_be_found_again(watch, concepts, elsewhere, tmp_path):
    elsewhere.put(concept(tmp_path / "own", "dog7"))
    elsewhere.put(concept(tmp_path / "own", "cat2", shade=4))
    [watch.tick() for _ in range(3)]
    elsewhere.take("dog7")
    [watch.tick() for _ in range(4)]
    assert watch.known() == {"cat2"} and not (concepts / "dog7").exists()
    (kept,) = (watch.root / "data" / ".work" / "removed").iterdir()
    assert (kept / "00.png").is_file()


def test_an_empty_place_removes_nothing(watch, concepts, elsewhere, tmp_path):
    """A disk that is not mounted looks like that."""
    elsewhere.put(concept(tmp_path / "own", "dog7"))
    [watch.tick() for _ in range(3)]
    elsewhere.take("dog7")
    elsewhere.system.makedirs(elsewhere.root, exist_ok=True)
    results = [watch.tick() for _ in range(4)]
    assert watch.known() == {"dog7"} and (concepts / "dog7").exists()
    assert any("is empty" in (complaints(result).get("dog7") or "") for result in results)


def test_a_place_that_cannot_be_reached_is_said_and_stops_nothing(watch, concepts):
    choose(watch.root, arrival="missing/place")
    concept(concepts, "dog7")
    result = watch.twice()
    assert reported(result) == ["dog7"]
    verdict = watch.verdict()
    assert verdict and "missing/place" in str(verdict.metadata["reasons"].value)


def test_a_place_without_its_driver_says_what_to_install():
    with pytest.raises(InputError, match="(?i)automation.arrival.*gcsfs"):
        core.listing("gs://bucket/concepts")


def test_data_concepts_itself_is_the_default_place(tmp_path):
    store = Store(tmp_path)
    assert core.address_of(store, "data/concepts") is None
    assert core.address_of(store, str(tmp_path / "data" / "concepts")) is None
    assert core.address_of(store, "s3://bucket/x/") == "s3://bucket/x"
