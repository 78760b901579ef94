"""A face as the image of a person: found by YuNet, compared by SFace, both run by OpenCV.

Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023; Zhong et al., "SFace: Sigmoid-Constrained Hypersphere
Loss for Robust Face Recognition", 2021, arXiv:2205.12010. OpenCV is an optional package, and no weights come along:
docs/encoders.md#faces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from personalize_core.errors import InputError, said_by
from personalize_core.files.stamps import sha256
from personalize_core.metrics.encoder_names import FACE_FILES

WIDTH = 128  # D, of SFace's features
SURE = 0.9  # the score from which YuNet's boxes count, OpenCV's own default
# An image's longer side when a face is looked for in it. YuNet was trained on faces of 10 to 300 pixels, as its authors
# say; of larger ones it misses many, or misplaces landmarks. The first suits what fills an image, the second, which
# is asked where the first shows nothing, what is small in it.
SIDES = (320, 640)


@dataclass(frozen=True)
class Faces:
    """Implements Encoder. An image in which no face is found has a row of zeros: its cosine with any face is 0."""

    name: str
    weights_hash: str
    detector: Any  # cv2.FaceDetectorYN, which is told the size of each image, and so serves one thread at a time
    recognizer: Any  # cv2.FaceRecognizerSF
    looks_for = "face"
    _one_at_a_time: Lock = field(default_factory=Lock, repr=False, compare=False)

    @property
    def preprocessing(self) -> str:
        sides = " px, else ".join(map(str, SIDES))
        return (
            f"the largest face that YuNet finds with a score of {SURE}, in the image reduced to {sides} px; cut from "
            "the image itself, aligned by its landmarks to 112 x 112"
        )

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        if not len(images):
            raise ValueError("there are no images to encode")
        return F.normalize(torch.stack([self._face_of(image) for image in images]), dim=1)

    def _face_of(self, image: Image.Image) -> Tensor:
        """(WIDTH,): of the largest face, by its box."""
        rgb = image.convert("RGB")
        sizes = dict.fromkeys(_reduced(rgb.size, side) for side in SIDES)
        with self._one_at_a_time:
            largest = next(filter(_is_found, (self._largest(rgb, size) for size in sizes)), None)
            if largest is None:
                return torch.zeros(WIDTH)
            feature = self.recognizer.feature(self.recognizer.alignCrop(_pixels(rgb), largest))
        return torch.from_numpy(np.array(feature, dtype=np.float32)).flatten()

    def _largest(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray | None:
        """(15,): x, y, width, height, five landmarks in pixels of the image, and the score; looked for in that size."""
        self.detector.setInputSize(size)
        _, faces = self.detector.detect(_pixels(image if size == image.size else image.resize(size)))
        if faces is None or not len(faces):
            return None
        scale = np.divide(image.size, size)
        largest: np.ndarray = max(faces, key=lambda face: float(face[2] * face[3])).copy()
        largest[:14] *= np.tile(scale, 7)
        return largest


def _is_found(face: np.ndarray | None) -> bool:
    return face is not None


def _reduced(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of the same shape, of which the longer is at most `side`."""
    factor = min(1.0, side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 as OpenCV takes them: blue, green, red."""
    return np.ascontiguousarray(np.asarray(image)[..., ::-1])


def load_faces(name: str, folder: Path) -> Faces:
    """The encoder with the weights of a folder that `encoder_names.find` has looked at.

    Raises:
        InputError: OpenCV cannot read them.
    """
    library: Any = import_module("cv2")  # which need not be installed
    detector, recognizer = (folder / file for file in FACE_FILES)
    try:
        return Faces(
            name,
            sha256(recognizer),
            library.FaceDetectorYN.create(str(detector), "", (320, 320), SURE),
            library.FaceRecognizerSF.create(str(recognizer), ""),
        )
    except library.error as error:
        raise InputError(f"{folder}: OpenCV cannot read the weights of {name!r} there: {said_by(error)}") from error
