"""Encoders and segmenters by name, and which weights a name stands for: read without loading one, or torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from personalize_core.errors import InputError, listed
from personalize_core.files.outside import is_folder, is_there, refuse_pickle
from personalize_core.files.stamps import sha256

Kind = Literal["text_image", "identity", "segmenter", "masc"]

MINI_WEIGHTS = Path(__file__).resolve().parents[1] / "mini" / "weights"
MINI = {"mini-clip": "clip", "mini-identity": "identity", "mini-segmenter": "segmenter"}  # name -> folder of weights


class OnHub(NamedTuple):
    """Where published weights lie."""

    repository: str
    revision: str  # a commit, so that the weights cannot change under us
    licence: str  # of the weights, as their repository states it
    gated: bool = False  # the hub gives them only to accounts that accepted their terms


# The commits of DINO and CLIPSeg are those that add model.safetensors to their repositories' last ones, which have
# pickles alone: requests of the hub's own converter that nobody has merged, refs/pr/1 and refs/pr/5.
PUBLISHED = {
    "clip-b32": OnHub(
        "timm/vit_base_patch32_clip_224.openai", "a6f597a30f7b82c51704746581f9a4e41421e878", "Apache-2.0"
    ),
    "clip-l14": OnHub(
        "timm/vit_large_patch14_clip_224.openai", "18d0535469bb561bf468d76c1d73aa35156c922b", "Apache-2.0"
    ),
    "dino-s16": OnHub("facebook/dino-vits16", "a7a4d161f5c0bd70478c05ca5777ec7cd8848021", "Apache-2.0"),
    "dino-s16-stock": OnHub("facebook/dino-vits16", "a7a4d161f5c0bd70478c05ca5777ec7cd8848021", "Apache-2.0"),
    "dinov2-s14": OnHub("facebook/dinov2-small", "ed25f3a31f01632728cabb09d1542f84ab7b0056", "Apache-2.0"),
    "dinov2-b14": OnHub("facebook/dinov2-base", "f9e44c814b77203eaa57a6bdbbd535f21ede1415", "Apache-2.0"),
    "dinov3-s16": OnHub(
        "facebook/dinov3-vits16-pretrain-lvd1689m", "114c1379950215c8b35dfcd4e90a5c251dde0d32", "DINOv3 License", True
    ),
    "dinov3-b16": OnHub(
        "facebook/dinov3-vitb16-pretrain-lvd1689m", "5931719e67bbdb9737e363e781fb0c67687896bc", "DINOv3 License", True
    ),
    "siglip2-b16": OnHub("google/siglip2-base-patch16-224", "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2", "Apache-2.0"),
    "siglip2-b16-256": OnHub(
        "google/siglip2-base-patch16-256", "3f9f96cb90da5dbc758b01813f2f6f1aee24c1ab", "Apache-2.0"
    ),
    "siglip2-so400m-naflex": OnHub(
        "google/siglip2-so400m-patch16-naflex", "cc24074f717b612951c2dead130904ab9b65a81e", "Apache-2.0"
    ),
    "clipseg": OnHub("CIDAS/clipseg-rd64-refined", "325a839908143a34b409ae6f2910fa015ea390e6", "Apache-2.0"),
}


MINI_OF: dict[Kind, str] = {"text_image": "mini-clip", "identity": "mini-identity", "segmenter": "mini-segmenter"}
PUBLISHED_OF: dict[Kind, tuple[str, ...]] = {
    "text_image": ("clip-b32", "clip-l14", "siglip2-b16", "siglip2-b16-256"),
    "identity": ("dino-s16", "dino-s16-stock", "dinov2-s14", "dinov2-b14", "dinov3-s16", "dinov3-b16"),
    "segmenter": ("clipseg",),
    "masc": ("siglip2-so400m-naflex",),
}


FACES = "sface"  # compares faces, see faces.py; an encoder of identity
FACE_FILES = ("face_detection_yunet_2023mar.onnx", "face_recognition_sface_2021dec.onnx")


def find(name_or_folder: str | Path, kind: Kind) -> tuple[str, Path | None]:
    """(name, local path). The path is None for published weights that have to be fetched.

    Raises:
        InputError: there is no such encoder, or its path leads nowhere.
    """
    text = str(name_or_folder)
    if text == MINI_OF.get(kind):
        return text, MINI_WEIGHTS / MINI[text]
    name, _, local = text.partition(":")
    if kind == "identity" and name == FACES:
        return name, _folder_of_faces(text, local)
    published = PUBLISHED_OF[kind]
    if name in published:
        if local and not (is_there(Path(local)) and Path(local).exists()):
            raise InputError(f"{text!r}: there is no {local}; write the path of its weights, or {name!r} to fetch them")
        if local and Path(local).is_file():
            refuse_pickle(Path(local))
        return name, Path(local) if local else None
    path = Path(text)
    if is_folder(path):
        return path.resolve().name, path
    what = "segmenter" if kind == "segmenter" else "encoder"
    names = [*filter(None, [MINI_OF.get(kind)]), *published]
    raise InputError(
        f"there is no {what} {text!r}: known are {listed(names)}; or write the path of a folder "
        f"with weights, or {published[0]}:PATH for the published weights if they lie on this machine"
    )


def weights_of(name: str) -> str:
    """Identifies an encoder's weights: the hash of local files, the commit of published ones.

    Raises:
        InputError: faces are to be compared, and cannot be.
    """
    if name in PUBLISHED:
        return f"{name} {PUBLISHED[name].repository}@{PUBLISHED[name].revision}"
    if name.partition(":")[0] == FACES:
        _, faces = find(name, "identity")
        assert faces is not None
        return f"{FACES} {' '.join(sha256(faces / file) for file in FACE_FILES)}"
    folder = MINI_WEIGHTS / MINI[name] if name in MINI else Path(name.partition(":")[2] or name)
    weights = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    return f"{name} {' '.join(sha256(path) for path in weights)}"


def _folder_of_faces(text: str, local: str) -> Path:
    """The folder with the weights that compare faces.

    Raises:
        InputError: it is not named, it lacks some, or the library that runs them is not installed.
    """
    if find_spec("cv2") is None:
        raise InputError(
            f"{text!r}: faces are found and compared by OpenCV, which is not installed here; install it: "
            ".venv/bin/python -m pip install --constraint constraints.txt opencv-python-headless"
        )
    where = f"put {listed(FACE_FILES)}, of opencv/face_detection_yunet and opencv/face_recognition_sface on the hub"
    if not local:
        raise InputError(f"weights that compare faces are not fetched: {where}, into a folder; write '{FACES}:FOLDER'")
    folder = Path(local)
    if missing := [file for file in FACE_FILES if not (folder / file).is_file()]:
        raise InputError(f"{text!r}: {folder} does not hold {listed(missing)}; {where}, there")
    return folder
