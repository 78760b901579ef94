"""Which modules of the package a module is made of, by its source."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "personalize_core"


def imported(module: str, within: str) -> set[str]:
    """Of the modules in a folder of the package, those that a module imports from, and those that these import from.

    Modules are named as in stamps, such as "training/loop"; `within` ends with "/".
    """
    found: set[str] = set()
    ahead = [module]
    while ahead:
        for node in ast.walk(ast.parse((PACKAGE / f"{ahead.pop()}.py").read_text())):
            if isinstance(node, ast.ImportFrom):
                name = (node.module or "").removeprefix("personalize_core.").replace(".", "/")
                if name.startswith(within) and name not in found:
                    found.add(name)
                    ahead.append(name)
    return found
