"""Faces as identity, with stand-ins for OpenCV's two networks, for no weights come along."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from personalize_core.errors import InputError
from personalize_core.metrics import encoder_names
from personalize_core.metrics.encoder_names import FACE_FILES, find, weights_of
from personalize_core.metrics.encoders import load_identity_encoder
from personalize_core.metrics.faces import SIDES, WIDTH, Faces

BACKGROUND = (10, 10, 10)


class Detector:
    """Finds every square of one bright colour. Like OpenCV's, it knows the size of one image at a time."""

    def setInputSize(self, size: tuple[int, int]) -> None:
        self.size = size

    def detect(self, pixels: np.ndarray) -> tuple[int, np.ndarray | None]:
        height, width, _ = pixels.shape
        assert (width, height) == self.size and pixels.flags["C_CONTIGUOUS"]
        colours = {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()} - {BACKGROUND}
        found = []
        for colour in sorted(colours):
            rows, columns = np.nonzero((pixels == colour).all(axis=-1))
            left, top = columns.min(), rows.min()
            found.append([left, top, columns.max() + 1 - left, rows.max() + 1 - top, *[0] * 10, 0.95])
        return 1, np.array(found, dtype=np.float32) if found else None


class Recognizer:
    """Its features are the colour of the face, blue first, and then zeros."""

    def alignCrop(self, pixels: np.ndarray, face: np.ndarray) -> np.ndarray:
        left, top, width, height = face[:4].astype(int)
        return pixels[top : top + height, left : left + width]

    def feature(self, aligned: np.ndarray) -> np.ndarray:
        feature = np.zeros((1, WIDTH), dtype=np.float32)
        feature[0, :3] = aligned[0, 0]
        return feature


class Refused(Exception):
    """As cv2.error."""


@pytest.fixture
def opencv(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    asked: list[tuple[Any, ...]] = []
    stand_in: Any = SimpleNamespace(
        asked=asked,
        error=Refused,
        FaceDetectorYN=SimpleNamespace(create=lambda *given: asked.append(given) or Detector()),
        FaceRecognizerSF=SimpleNamespace(create=lambda *given: asked.append(given) or Recognizer()),
    )
    monkeypatch.setitem(sys.modules, "cv2", stand_in)
    monkeypatch.setattr(encoder_names, "find_spec", lambda name: stand_in)
    return stand_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in FACE_FILES:
        (tmp_path / file).write_bytes(file.encode())
    return tmp_path


def picture(*faces: tuple[int, tuple[int, int, int]], size: tuple[int, int] = (40, 24)) -> Image.Image:
    """faces: (side, RGB colour) of squares from left to right."""
    image, left = Image.new("RGB", size, BACKGROUND), 0
    for side, colour in faces:
        image.paste(colour, (left, 0, left + side, side))
        left += side
    return image


def test_the_largest_face_is_compared_with_its_channels_in_opencvs_order(opencv, folder):
    encoder = load_identity_encoder(f"sface:{folder}")
    shown = [picture((5, (250, 0, 0)), (12, (0, 30, 40))), picture((9, (200, 100, 0)), size=(16, 16))]
    features = encoder.images(shown)
    expected = torch.zeros(2, WIDTH)
    expected[0, :3] = torch.tensor([40.0, 30, 0]) / 50  # blue, green, red of the larger one
    expected[1, :3] = torch.tensor([0.0, 100, 200]) / np.sqrt(100**2 + 200**2)
    torch.testing.assert_close(features, expected)
    assert opencv.asked[0][0] == str(folder / FACE_FILES[0]) and opencv.asked[1][0] == str(folder / FACE_FILES[1])


def test_an_image_without_a_face_is_unlike_every_face(opencv, folder):
    encoder = load_identity_encoder(f"sface:{folder}")
    features = encoder.images([picture(), picture((9, (200, 100, 0)))])
    assert torch.equal(features[0], torch.zeros(WIDTH)) and float(features[0] @ features[1]) == 0
    with pytest.raises(ValueError, match="no images"):
        encoder.images([])


class Limited(Detector):
    """Misses what is larger than 300 pixels, as YuNet may, and what is smaller than 10; it puts landmarks in a row."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def detect(self, pixels: np.ndarray) -> tuple[int, np.ndarray | None]:
        self.sizes.append(self.size)
        assert pixels.shape[:2] == self.size[::-1]
        rows, columns = np.nonzero((pixels > 128).any(axis=-1))
        if not len(rows):
            return 1, None
        left, top = columns.min(), rows.min()
        width, height = columns.max() + 1 - left, rows.max() + 1 - top
        if not 10 <= max(width, height) <= 300:
            return 1, None
        landmarks = [[left + width * n / 4, top + height * n / 4] for n in range(5)]
        return 1, np.array([[left, top, width, height, *np.ravel(landmarks), 0.95]], dtype=np.float32)


class Recorder(Recognizer):
    """Remembers what it is to crop, and from what."""

    def alignCrop(self, pixels: np.ndarray, face: np.ndarray) -> np.ndarray:
        self.shape, self.face = pixels.shape, face
        return super().alignCrop(pixels, face)


@pytest.mark.parametrize(
    ("size", "face", "sizes"),
    [
        ((3000, 2000), (600, 300, 1600, 1200), [(320, 213)]),  # fills the image: 1600 pixels wide, 171 in the copy
        (
            (1280, 1280),
            (640, 320, 32, 32),
            [(320, 320), (640, 640)],
        ),  # small: 8 pixels in the first copy, 16 in the next
        ((300, 200), (40, 60, 100, 80), [(300, 200)]),  # small enough as it is, never enlarged
        ((640, 400), None, [(320, 200), (640, 400)]),
        ((200, 100), None, [(200, 100)]),  # both copies are the image itself, looked at once
    ],
)
def test_a_face_is_looked_for_in_copies_of_the_size_that_the_detector_knows_and_cut_from_the_image(size, face, sizes):
    detector, recognizer = Limited(), Recorder()
    image = Image.new("RGB", size, BACKGROUND)
    if face:
        left, top, width, height = face
        image.paste((250, 200, 0), (left, top, left + width, top + height))
    feature = Faces("sface", "0", detector, recognizer).images([image])[0]
    assert detector.sizes == sizes
    assert bool(feature.any()) == (face is not None)
    if face:
        corners = [(left + width * n / 4, top + height * n / 4) for n in range(5)]
        slack = max(size) / max(sizes[-1])  # a pixel of the copy
        assert recognizer.shape[:2] == size[::-1] and recognizer.face.dtype == np.float32
        np.testing.assert_allclose(recognizer.face[:14], [*face, *np.ravel(corners)], atol=2 * slack)
        assert recognizer.face[14] == np.float32(0.95)


def test_the_encoder_says_what_it_is_and_both_networks_count_as_its_weights(opencv, folder):
    encoder = load_identity_encoder(f"sface:{folder}")
    assert encoder.name == "sface" and "YuNet" in encoder.preprocessing
    assert all(f"{side} px" in encoder.preprocessing for side in SIDES)
    before = weights_of(f"sface:{folder}")
    (folder / FACE_FILES[0]).write_bytes(b"another detector")
    assert weights_of(f"sface:{folder}") != before


def test_without_the_library_it_is_refused_with_the_reason_and_what_to_install(monkeypatch, folder):
    monkeypatch.setattr(encoder_names, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"OpenCV, which is not installed here; install it: .*opencv-python-headless"):
        find(f"sface:{folder}", "identity")


def test_without_weights_it_is_refused_with_where_they_are(opencv, folder):
    (folder / FACE_FILES[1]).unlink()
    for ask in (lambda name: find(name, "identity"), weights_of):
        with pytest.raises(InputError, match="weights that compare faces are not fetched: put face_detection_yunet"):
            ask("sface")
        with pytest.raises(InputError, match="does not hold face_recognition_sface_2021dec.onnx"):
            ask(f"sface:{folder}")
        with pytest.raises(InputError, match="/nowhere does not hold face_detection_yunet"):
            ask("sface:/nowhere")


def test_weights_that_opencv_cannot_read_are_refused_in_a_sentence(opencv, folder):
    def refuse(*given: Any) -> None:
        raise Refused("OpenCV(5.0.0)\n  error: (-5:Bad argument)")

    opencv.FaceDetectorYN.create = refuse
    with pytest.raises(InputError, match=r"OpenCV cannot read the weights of 'sface' there: OpenCV\(5.0.0\) error"):
        load_identity_encoder(f"sface:{folder}")


def test_it_is_an_encoder_of_identity_alone(opencv, folder):
    with pytest.raises(InputError, match="there is no encoder 'sface:"):
        find(f"sface:{folder}", "text_image")
