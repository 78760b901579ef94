"""Images to features: chunks in several threads, images that cannot be read, and what an interrupted scoring keeps."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from personalize_core.errors import InputError
from personalize_core.metrics import features
from personalize_core.metrics.chunks import even_chunks, in_workers
from personalize_core.metrics.features import Encoders, Processing, Seen
from personalize_core.metrics.kept_features import KeptFeatures
from tests.imports import imported
from tests.metrics.counting_encoder import Bright, Counting, made
from tests.metrics.interrupted_scoring import STOP_AT

torch.set_num_threads(1)
ROOT = Path(features.__file__).parents[2]


def test_kept_features_depend_on_every_file_of_metrics_that_the_encoders_import_to_prepare_or_run():
    """Encoders' names say only where weights lie, and those are hashed."""
    found = {"metrics/encoders"} | imported("metrics/encoders", "metrics/")
    assert "metrics/faces" in found
    assert found - {"metrics/encoder_names"} <= set(features.SOURCES)


def noise(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Small images, in the order of their names."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(folder / f"{number:04d}.png")
    return sorted(folder.glob("*.png"))


def equal(one: Seen, other: Seen) -> bool:
    """Bit for bit."""
    return (
        one.features.keys() == other.features.keys()
        and all(torch.equal(some, other.features[key]) for key, some in one.features.items())
        and (one.foreground, list(one.left_out)) == (other.foreground, list(other.left_out))
    )


def encoded(encoders: Encoders) -> int:
    """How many images the first encoder has seen whole: its masked views are as many."""
    first = encoders.text_image[0]
    assert isinstance(first, Counting)
    return sum(first.asked) // 2


# -- chunks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 65, 1000])
def test_chunks_cover_all_in_order_and_are_nearly_equal(count):
    chunks = even_chunks(count, 32)
    assert [place for chunk in chunks for place in chunk] == list(range(count))
    sizes = [len(chunk) for chunk in chunks]
    assert len(chunks) == -(-count // 32) and max(sizes, default=0) <= 32
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_workers_keep_the_order_take_up_few_and_leave_the_threads_as_they_were():
    taken, lock, most = [], threading.Lock(), 0

    def worked(item: int) -> tuple[int, int]:
        with lock:
            taken.append(item)
        return item, torch.get_num_threads()

    before = torch.get_num_threads()
    for number, (item, threads) in enumerate(in_workers(worked, range(50), 3)):
        assert (item, threads) == (number, 1)
        most = max(most, len(taken) - number)
    assert most <= 6 and sorted(taken) == list(range(50)) and torch.get_num_threads() == before


def test_what_a_worker_raises_is_raised_and_the_rest_never_begins():
    taken = []

    def worked(item: int) -> int:
        taken.append(item)
        if item == 3:
            raise InputError("the fourth")
        return item

    with pytest.raises(InputError, match="the fourth"):
        list(in_workers(worked, range(100), 2))
    assert len(taken) < 10


def test_features_are_the_same_bits_however_many_workers_there_are(tmp_path):
    paths = noise(tmp_path, 70)
    encoders = features.load_encoders(["mini-clip"], ["mini-identity"], "mini-segmenter", ["class_phrase"], "cpu")
    one, three = (Seen.of(paths, "dog", None, encoders, Processing(workers)) for workers in (1, 3))
    assert len(one.features) == 4 and all(len(some) == 70 for some in one.features.values())
    assert equal(one, three)


def test_progress_counts_images_and_ends_with_all(tmp_path):
    told = []
    Seen.of(noise(tmp_path, 70), "dog", None, made(), Processing(2, progress=lambda *numbers: told.append(numbers)))
    assert told == [(0, 70), (23, 70), (46, 70), (70, 70)]


# -- images that cannot be read --------------------------------------------------------------------------------


def huge_png() -> bytes:
    """30,000 x 30,000 pixels by its header, and hardly any in it."""

    def part(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(header) + part(b"IDAT" + zlib.compress(bytes(9))) + part(b"IEND")


@pytest.fixture
def mixed(tmp_path) -> list[Path]:
    """40 images, of which five cannot be read; of the others one is large and one has a colour profile."""
    paths = noise(tmp_path, 40)
    paths[3].write_bytes(paths[3].read_bytes()[:-40])
    paths[10].write_bytes(b"")
    paths[20].write_bytes(huge_png())
    paths[21].write_text("no image")
    paths[39].unlink()
    Image.new("RGB", (300, 200), "teal").save(paths[5])
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with io.BytesIO() as written:
        Image.new("RGB", (16, 16), "olive").save(written, "PNG", icc_profile=profile)
        paths[6].write_bytes(written.getvalue())
    return paths


def test_images_that_cannot_be_read_are_left_out_with_their_reasons_and_the_rest_is_encoded(mixed):
    seen = Seen.of(mixed, "dog", None, made(), unreadable="leave_out")
    reasons = dict(seen.left_out)
    assert list(reasons) == [3, 10, 20, 21, 39]
    assert "cannot be read as an image" in reasons[3] and reasons[10].startswith("is empty")
    assert reasons[20].startswith("has too many pixels") and "none of JPEG" in reasons[21]
    assert not any(str(mixed[0].parent) in reason for reason in reasons.values())
    rest = Seen.of([path for place, path in enumerate(mixed) if place not in reasons], "dog", None, made())
    assert equal(replace(seen, left_out=()), rest) and len(rest.foreground or ()) == 35


def test_unless_it_is_asked_for_an_image_that_cannot_be_read_is_an_error_that_names_it(mixed):
    with pytest.raises(InputError, match=r"0003\.png .*cannot be read as an image"):
        Seen.of(mixed, "dog", None, made(), Processing(2))


def test_if_no_image_can_be_read_that_is_an_error(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 2 images can be read; of a\.png: it is empty"):
        Seen.of(paths, "dog", None, made(), unreadable="leave_out")


# -- what is kept ----------------------------------------------------------------------------------------------


def test_a_scoring_that_was_killed_encodes_the_rest_alone_and_comes_to_the_same_bits(tmp_path):
    paths = noise(tmp_path, 200)
    command = [sys.executable, "-m", "tests.metrics.interrupted_scoring", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        for line in process.stdout:
            if (done := int(line)) >= STOP_AT:
                break
        process.kill()
    again, anew = made(), made()
    seen = Seen.of(paths, "dog", None, again, Processing(2, kept=KeptFeatures(tmp_path / "k")))
    assert STOP_AT <= done < 200 and encoded(again) == 200 - done
    assert equal(seen, Seen.of(paths, "dog", None, anew)) and encoded(anew) == 200


@pytest.mark.parametrize(
    "changed", ["nothing", "weights", "preprocessing", "segmenter", "class noun", "device", "image"]
)
def test_kept_features_are_of_just_these_images_encoders_and_masks(tmp_path, changed):
    paths = noise(tmp_path, 64)
    kept = Processing(kept=KeptFeatures(tmp_path / "k"))
    Seen.of(paths, "dog", None, made(), kept)
    encoders, noun = made(), "dog"
    if changed in ("weights", "preprocessing"):
        encoders = made(**{{"weights": "weights_hash"}.get(changed, changed): "another"})
    elif changed == "segmenter":
        encoders = replace(encoders, segmenter=Bright(weights_hash="2" * 64))
    elif changed == "class noun":
        noun = "cat"
    elif changed == "device":
        kept = replace(kept, device="cuda")
    elif changed == "image":
        Image.new("RGB", (8, 9), "red").save(paths[40])
    seen = Seen.of(paths, noun, None, encoders, kept)
    assert encoded(encoders) == {"nothing": 0, "image": 32}.get(changed, 64)
    assert equal(seen, Seen.of(paths, noun, None, made()))


def test_a_damaged_file_of_kept_features_is_made_again(tmp_path):
    paths, kept = noise(tmp_path, 64), KeptFeatures(tmp_path / "k")
    Seen.of(paths, "dog", None, made(), Processing(kept=kept))
    first, second = sorted(kept.folder.iterdir())
    first.write_bytes(first.read_bytes()[:100])
    second.write_bytes(b"")
    encoders = made()
    Seen.of(paths, "dog", None, encoders, Processing(kept=kept))
    assert encoded(encoders) == 64
    kept.remove()
    assert not kept.folder.exists()


def test_reasons_are_kept_too_and_an_error_stays_an_error(mixed):
    kept = KeptFeatures(mixed[0].parent / "k")
    first, again = made(), made()
    one, two = (
        Seen.of(mixed, "dog", None, some, Processing(kept=kept), unreadable="leave_out") for some in (first, again)
    )
    assert equal(one, two) and len(one.left_out) == 5 and encoded(again) == 0
    with pytest.raises(InputError, match=r"0003\.png"):
        Seen.of(mixed, "dog", None, made(), Processing(kept=kept))
