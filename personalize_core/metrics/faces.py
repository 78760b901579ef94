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

from personalize_core.errors import InputError
from personalize_core.files.stamps import sha256
from personalize_core.metrics.encoder_names import FACE_FILES

WIDTH = 128  # D, of SFace's features
SURE = 0.9  # the score from which YuNet's boxes count, OpenCV's own default


@dataclass(frozen=True)
class Faces:
    """Implements Encoder. An image in which no face is found has a row of zeros: its cosine with any face is 0."""

    name: str
    weights_hash: str
    detector: Any  # cv2.FaceDetectorYN, which is told the size of each image, and so serves one thread at a time
    recognizer: Any  # cv2.FaceRecognizerSF
    _one_at_a_time: Lock = field(default_factory=Lock, repr=False, compare=False)

    @property
    def preprocessing(self) -> str:
        return f"the largest face that YuNet finds with a score of {SURE}, aligned by its landmarks to 112 x 112"

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        if not len(images):
            raise ValueError("there are no images to encode")
        return F.normalize(torch.stack([self._face_of(image) for image in images]), dim=1)

    def _face_of(self, image: Image.Image) -> Tensor:
        """(WIDTH,): of the largest face, by its box."""
        rgb = image.convert("RGB")
        pixels = np.ascontiguousarray(np.asarray(rgb)[..., ::-1])  # OpenCV's channels are blue, green, red
        with self._one_at_a_time:
            self.detector.setInputSize(rgb.size)
            _, faces = self.detector.detect(pixels)  # each: x, y, width, height, five landmarks, score
            if faces is None or not len(faces):
                return torch.zeros(WIDTH)
            largest = max(faces, key=lambda face: float(face[2] * face[3]))
            feature = self.recognizer.feature(self.recognizer.alignCrop(pixels, largest))
        return torch.from_numpy(np.array(feature, dtype=np.float32)).flatten()


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
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: OpenCV cannot read the weights of {name!r} there: {said}") from error
