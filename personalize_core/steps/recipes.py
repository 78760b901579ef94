"""What params.yaml says to a step: which base model, which recipe, how photographs are prepared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from personalize_core.errors import InputError
from personalize_core.methods import method_class
from personalize_core.models import load_base_model
from personalize_core.store import Store

if TYPE_CHECKING:
    from personalize_core.base import BaseModel
    from personalize_core.data import Preprocessing


def load_base(store: Store) -> BaseModel:
    return load_base_model(store.params.base_model, store.params.device, store.params.precision)


def recipe_of(store: Store, method: str) -> Any:
    """The method's Config, where it can be trained as params.yaml says."""
    config = store.params.config(method)
    if store.params.gradient_checkpointing and method_class(method).losses_read_attention(config):
        raise InputError(
            f"gradient_checkpointing runs the U-Net again for the gradient, and a loss of {method} looks at the "
            "attention of the first run, so it would teach nothing; write `gradient_checkpointing: false` in "
            "params.yaml, or leave this method out"
        )
    return config


def preprocessing_of(store: Store, method: str) -> Preprocessing:
    return method_class(method).preprocessing_for(store.params.config(method))


def class_images_wanted(store: Store) -> int:
    """The most class images that any method of params.yaml asks the base model for; 0 if none does."""
    return max((asked_for(store, method) for method in asking_for_class_images(store)), default=0)


def asking_for_class_images(store: Store) -> list[str]:
    """The methods of params.yaml that want pictures of the class noun by the base model."""
    recipes = [(name, method_class(name), store.params.config(name)) for name in store.params.method_names]
    return [name for name, kind, c in recipes if kind.class_images(c) and not kind.real_class_images(c)]


def asked_for(store: Store, method: str) -> int:
    return method_class(method).class_images(store.params.config(method))
