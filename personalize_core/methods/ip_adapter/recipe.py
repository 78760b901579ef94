"""IP-Adapter's recipe: which adapter reads the concept images; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError, listed
from personalize_core.files.outside import is_folder, refuse_pickles_in, user_path
from personalize_core.files.stamps import folder_hash, stamp_of
from personalize_core.methods.recipe import Recipe, options


@dataclass(frozen=True)
class Published:
    """An adapter on the hub."""

    repository: str
    revision: str  # a commit, so that the weights cannot change under us
    weights: str
    encoder: str  # the folder of the image encoder that it was trained with
    text_width: int  # D of the base models that it was trained for


ADAPTERS = {
    "sd15": Published(
        "h94/IP-Adapter",
        "018e402774aeeddd60609b4ecdb7e298259dc729",
        "models/ip-adapter_sd15.safetensors",
        "models/image_encoder",
        768,
    ),
    "sdxl": Published(
        "h94/IP-Adapter",
        "018e402774aeeddd60609b4ecdb7e298259dc729",
        "sdxl_models/ip-adapter_sdxl.safetensors",
        "sdxl_models/image_encoder",
        2048,
    ),
}
ENCODER = "image_encoder"  # the image encoder's folder in an adapter's own
LAYOUT = f"one safetensors file of weights and, in {ENCODER}/, the image encoder"


def folder_of(adapter: str) -> Path:
    """The folder that an adapter lies in which is not known by name.

    Raises:
        InputError: there is none, or it lacks something.
    """
    folder = user_path(adapter)
    if not is_folder(folder):
        raise InputError(
            f"there is no IP-Adapter {adapter!r}; known are {listed(list(ADAPTERS))}, or a folder with {LAYOUT}"
        )
    found, encoder = sorted(folder.glob("*.safetensors")), folder / ENCODER
    if not found:
        refuse_pickles_in(folder, in_parts=True)
        raise InputError(f"{folder} holds no weights of an IP-Adapter; put there {LAYOUT}")
    if len(found) > 1:
        raise InputError(f"{folder} holds {listed(file.name for file in found)}; leave there {LAYOUT}")
    if not encoder.is_dir():
        raise InputError(f"{encoder} does not exist; put there the image encoder that the adapter was trained with")
    if not any(encoder.glob("*.safetensors")):
        refuse_pickles_in(encoder)
        raise InputError(f"{encoder} holds no weights of an image encoder; put model.safetensors there")
    return folder


@options
class Sampling:
    """How the concept images act on what is sampled; an artifact serves every scale."""

    # lambda of eq. 5. The paper samples with 1; with words beside the image, the authors' README says, 0.5 serves most.
    scale: Annotated[float, Field(ge=0, description="weighs what the concept images say beside the prompt")] = 0.5


@options
class Config(Recipe):
    """Nothing is learned: a pretrained adapter lets the cross-attention read the concept images too.

    The default is the authors' first adapter for Stable Diffusion 1; "sdxl" is that for Stable Diffusion XL.
    """

    display_name = "IP-Adapter"
    learns = "nothing; a pretrained adapter reads the concept images"
    authors = "Ye et al."
    title = "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models"
    arxiv = "2308.06721"
    Sampling = Sampling

    adapter: str = "sd15"  # by its name in ADAPTERS, or a folder, see folder_of

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=False)

    @property
    def lacks(self) -> Mapping[str, str]:
        return {"lag": "images are no words, so no location looks at them alone"}

    @property
    def files(self) -> str:
        if known := ADAPTERS.get(self.adapter):
            return f"{known.repository}@{known.revision}/{known.weights}"
        folder = folder_of(self.adapter)
        return stamp_of({"weights": folder_hash(folder), "encoder": folder_hash(folder / ENCODER)})
