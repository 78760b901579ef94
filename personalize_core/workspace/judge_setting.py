"""params.yaml, judge: a vision-language model that scores images beside the encoders; docs/judge.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from personalize_core.files.http import LOOPBACK
from personalize_core.files.typed_yaml import SECRET
from personalize_core.workspace.sections import Section

Text = Annotated[str, Field(min_length=1, max_length=300)]
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
KEY = re.compile(r"(Bearer\s|AIza|(sk-|sk_|gsk_|xai-|hf_|ghp_|nvapi-)(?=\S{8}))")  # how the keys of providers begin


class LocalModel(Section):
    """A model that transformers loads on this machine."""

    model: Text  # OWNER/NAME on the Hugging Face Hub, or a folder
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None  # a commit; for a model on the hub


class Judge(Section):
    """Who scores images, and what it is shown. Of the last two settings no score depends."""

    address: Annotated[str, Field(max_length=500)] | None = None  # of a server that speaks OpenAI's chat completions
    model: Text | None = None  # the name that the server knows it by
    key_variable: str | None = None  # the environment's variable that holds the server's key; None: it wants none
    local: LocalModel | None = None  # in place of an address
    image_size: Annotated[int, Field(ge=32, le=4096)] = 512  # pixels; the longer side of what it is shown, at most
    detail: Literal["low", "high", "auto"] | None = "high"  # as OpenAI's servers take it; None: it is not sent
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0  # None: not sent, for models that refuse it
    repetitions: Annotated[int, Field(ge=1, le=20)] = 1  # how often each question is asked; the score is the mean
    concept_images: Annotated[int, Field(ge=1, le=20)] = 1  # that an image is compared with, the first ones
    requests_at_once: Annotated[int, Field(ge=1, le=64)] = 4
    timeout: Annotated[float, Field(ge=1, le=3600)] = 120.0  # seconds, until an answer has come

    @model_validator(mode="before")
    @classmethod
    def _no_secret(cls, written: Any) -> Any:
        """Before any other check: a message must not repeat what may be a key."""
        if not isinstance(written, Mapping):
            raise PydanticCustomError(SECRET, "it should be keys and their values, or null")
        for name, value in _texts(written):
            if name == "key_variable" and not VARIABLE.fullmatch(value):
                raise PydanticCustomError(
                    SECRET,
                    "key_variable should be the name of an environment variable in capital letters, such as "
                    "OPENAI_API_KEY, and never the key itself",
                )
            if KEY.match(value):
                raise PydanticCustomError(
                    SECRET,
                    "{name} looks like a key. Keys do not belong in this file: put it in an environment variable, "
                    "name that in key_variable, and revoke the key if this file was shared",
                    {"name": name},
                )
            if name == "address":
                _check_address(value, bool(written.get("key_variable")))
        return written

    @model_validator(mode="after")
    def _one_judge(self) -> Judge:
        if (self.address is None) == (self.local is None):
            raise ValueError("write either address and model, or local")
        if (self.address is None) != (self.model is None):
            raise ValueError("address and model come together; of a local model, the name stands in local.model")
        if self.local is not None:
            if self.key_variable is not None:
                raise ValueError("key_variable is for an address; a local model wants no key")
            if self.temperature != 0 or self.repetitions != 1:
                raise ValueError("a local model always gives its most probable answer: temperature 0, one repetition")
        return self

    @property
    def scored_by(self) -> dict[str, Any]:
        """What its scores depend on."""
        of_servers = {"detail"} if self.local else set()
        return self.model_dump(exclude={"key_variable", "requests_at_once", "timeout", *of_servers})


def _texts(written: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in written.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{str(name)[:100]}.")
        elif isinstance(value, str):
            yield f"{prefix}{str(name)[:100]}", value


def _check_address(address: str, with_key: bool) -> None:
    try:
        parts = urlsplit(address)
        host = parts.hostname
        parts.port  # noqa: B018  it raises where it is no number
    except ValueError:
        host, parts = None, None
    if not parts or parts.scheme not in ("http", "https") or not host or re.search(r"\s", address):
        raise PydanticCustomError(SECRET, "address should be like https://api.openai.com/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise PydanticCustomError(
            SECRET, "address should hold no user, password or query; a key belongs in key_variable's variable"
        )
    if with_key and parts.scheme == "http" and host not in LOOPBACK:
        raise PydanticCustomError(
            SECRET, "the key would travel to {host} in clear; write an https:// address", {"host": host}
        )
