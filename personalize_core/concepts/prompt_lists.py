"""Prompt lists: text files, one template a line, with a slot where the concept belongs."""

from __future__ import annotations

from pathlib import Path

from personalize_core.concepts.concept import SLOT, check_placeholders
from personalize_core.errors import InputError, listed, shown
from personalize_core.files.outside import is_there, read_text

TRAINING = (
    Path(__file__).parents[1] / "methods" / "training_prompts"
)  # lists that belong to a published method's recipe


def read_list(path: Path) -> list[str]:
    """The templates of a list. Empty lines and lines that begin with '#' (source, licence) are skipped.

    Raises:
        InputError: there is no such list, it is not text in UTF-8, it is empty, or a template has no slot or a
            placeholder.
    """
    if not is_there(path):
        known = sorted(other.stem for other in path.parent.glob("*.txt"))
        raise InputError(f"there is no prompt list {path.stem!r} in {path.parent}; there are {listed(known)}")
    lines = [line.strip() for line in read_text(path).splitlines()]
    templates = [line for line in lines if line and not line.startswith("#")]
    for template in templates:
        if template.count(SLOT) != 1:
            raise InputError(
                f"{path}: {shown(template)} must name the concept exactly once; write {SLOT!r} in its place"
            )
        try:
            check_placeholders(template, [])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    if not templates:
        raise InputError(f"{path} holds no prompt; write one template a line, with {SLOT!r} where the concept belongs")
    return templates
