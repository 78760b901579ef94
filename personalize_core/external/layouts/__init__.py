"""The layouts of folders of images, one module per tool; which of them a folder has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from personalize_core.errors import InputError, listed, shown
from personalize_core.external.folders import check_folder, folder_names, image_names
from personalize_core.external.layouts import (
    ai_toolkit,
    comfyui,
    customconcept101,
    diffusers_scripts,
    dreambench_plus,
    kohya,
    manifest,
    numbered,
    peft,
    simpletuner,
    workspace,
)
from personalize_core.external.listing import Listing, check


class Layout(Protocol):
    """What a layout's module holds."""

    @property
    def NAME(self) -> str: ...

    @property
    def MEANING(self) -> str:
        """What such a folder holds, in one line of Markdown."""
        ...

    @property
    def OPTIONS(self) -> Mapping[str, str]:
        """The options that `read` knows, with their meanings in one line each."""
        ...

    def recognises(self, folder: Path) -> bool:
        """Does the folder look like this layout? By names alone; small files may be read.

        Raises:
            InputError: the folder cannot be read.
        """
        ...

    def read(self, folder: Path, options: Mapping[str, str]) -> Listing:
        """The folder's images.

        Raises:
            InputError: the folder does not have this layout, or what it says is wrong or ambiguous.
        """
        ...


_MODULES: tuple[Layout, ...] = (
    manifest,
    numbered,
    peft,
    ai_toolkit,
    simpletuner,
    kohya,
    diffusers_scripts,
    comfyui,
    dreambench_plus,
    customconcept101,
    workspace,
)
LAYOUTS = {layout.NAME: layout for layout in _MODULES}
"""By name. A folder with a manifest has that layout, whatever else it looks like."""


def read_listing(folder: Path, layout: str | None = None, options: Mapping[str, str] = {}) -> Listing:
    """The images of a folder, with their prompts and seeds.

    Args:
        layout: one of `LAYOUTS`; without one, the layout that the folder looks like.
        options: of the layout; a key of its `OPTIONS` each.

    Raises:
        InputError: there is no such folder, layout or option; no layout or more than one fits; or what the folder
            holds is wrong, see `Layout.read` and `listing.check`.
    """
    check_folder(folder)
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"there is no layout {shown(layout)}; there are {listed(LAYOUTS)}")
    found = LAYOUTS[layout] if layout is not None else _recognised(folder)
    if unknown := [option for option in options if option not in found.OPTIONS]:
        raise InputError(
            f"the layout {found.NAME!r} has no option {listed(map(shown, unknown))}; it has {listed(found.OPTIONS)}"
        )
    listing = found.read(folder, options)
    check(listing, folder)
    return listing


def _recognised(folder: Path) -> Layout:
    if manifest.recognises(folder):
        return manifest
    fitting = [layout for layout in LAYOUTS.values() if layout.recognises(folder)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(
            f"{folder} fits the layouts {listed(layout.NAME for layout in fitting)}; choose one with --layout"
        )
    if not image_names(folder) and not folder_names(folder):
        raise InputError(f"{folder} holds no images; name the folder that holds them")
    raise InputError(
        f"{folder} has none of the known layouts ({listed(LAYOUTS)}); write {manifest.CSV} there with the columns "
        "file, prompt and seed, or choose a layout with --layout"
    )
