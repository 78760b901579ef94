"""The recipe of Extended Textual Inversion (XTI), the space P+.

The authors released no code. The recipe is that of a public port; see docs/methods.md.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from personalize_core.base_model.layers import STABLE_DIFFUSION_LAYERS
from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.methods.recipe import Recipe, options
from personalize_core.methods.shared.options import MinTimestep, TokenRule


@options
class Config(Recipe):
    """Sixteen input embeddings; each cross-attention layer reads the prompt as encoded with its own.

    Defaults are those of a public port, mkshing/prompt-plus-pytorch, for Stable Diffusion 1.4.
    """

    display_name = "XTI"
    learns = "one embedding for each cross-attention layer"
    authors = "Voynov et al."
    title = "P+: Extended Textual Conditioning in Text-to-Image Generation"
    arxiv = "2303.09522"

    steps: Annotated[int, Field(gt=0)] = 500
    batch_size: Annotated[int, Field(gt=0)] = 8
    lr: Annotated[float, Field(gt=0)] = 5e-3
    min_timestep: MinTimestep = 0
    templates: str = "ti_object_27"  # training prompts; the concept alone stands in their slot
    class_token_rule: TokenRule = "last"  # the embeddings start from this token of the class noun

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("squash", "bicubic", flip=True)

    @property
    def text_embeddings(self) -> int:
        return STABLE_DIFFUSION_LAYERS
