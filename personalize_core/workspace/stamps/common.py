"""What the results of several steps depend on."""

from __future__ import annotations

from typing import Any

from personalize_core.base_model.loading import Identity, identify
from personalize_core.files.snapshot import memoized
from personalize_core.workspace.store import Store


@memoized
def base_model(store: Store) -> Identity:
    return identify(store.params.base_model)


def base_model_name(store: Store) -> str:
    return base_model(store).name


def computed_by(store: Store) -> dict[str, Any]:
    """Compiled code rounds otherwise, and images may have a size that is not the base model's own. Nothing without
    either, so that what was made before there were such settings keeps its stamp."""
    params = store.params
    sized = {"image_size": params.image_size} if params.image_size else {}
    return {"compile": True, **sized} if params.compile else sized


def held_out(store: Store) -> dict[str, Any]:
    """Nothing where no image is held out, so that what was made before there was such a setting keeps its stamp."""
    return {"held_out": store.params.held_out} if store.params.held_out else {}
