"""Files from public bug reports, handed over in a folder: `--inputs FOLDER`. What its folders are called says what they
hold: pictures, tiff, exif and names (images), lora and embeddings, params, prompts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.hostile_inputs import images, imports, settings
from benchmarks.hostile_inputs.runner import Case, Right

REFUSED = ("nan", "empty", "loha", "lokr", "escape", "alpha_none", "float", "int32", "latin1", "utf16", "duplicate")


def prepare(folder: Path) -> None:
    imports.prepare(folder)


def cases(folder: Path, inputs: Path) -> Iterator[Case]:
    for path in sorted(each for each in inputs.rglob("*") if each.is_file()):
        kind, content = path.parent.name, path.read_bytes()
        right: Right = "refused" if any(word in path.name for word in REFUSED) else "either"
        name = f"reported/{kind}/{path.name}"
        if kind in ("lora", "embeddings"):
            method = imports.LORA if kind == "lora" else "textual_inversion"
            case = imports.case(name, method, folder, partial(imports.copy, path), right, path.name, imports.finite)
        elif kind == "params":
            case = settings.in_workspace(name, folder / "plain", settings.PARAMS, content, right)
        elif kind == "prompts":
            named = ("two",)
            case = settings.in_workspace(name, folder / "plain", settings.LIST, content, right, named=named)
        else:
            case = images.one(path.name, content, right, called=name)
        yield Case(name, case.give, case.read, right, case.holds, case.named, case.originals, case.made)
