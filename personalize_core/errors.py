"""What a user can mend."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from typing import Any

_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and half characters

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


class InputError(ValueError):
    """Something that was given to the program is wrong: one sentence says what, where and how to mend it.

    The command line prints the sentence alone; any other exception is a fault of ours and keeps its traceback. What
    no terminal prints, such as the bytes of a file name that is not UTF-8, is written as an escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The same, with an escape for each character that no terminal prints and no file in UTF-8 holds."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def shown(value: Any) -> str:
    """A value for a message: as repr writes it, and cut where it is long, whatever the value is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"


def said_by(error: Exception) -> str:
    """What a library says is wrong, on one line and cut where it is long; its error's class, if it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def together(errors: Sequence[InputError]) -> InputError:
    """One error with all that is wrong: a line for each problem, where there are several."""
    problems = list(dict.fromkeys(map(str, errors)))
    if len(problems) == 1:
        return errors[0]
    return InputError("\n- ".join([f"{len(problems)} things are wrong:", *problems]))


def listed(names, most: int | None = None) -> str:
    """'a, b and c', for messages that say what is known; of more than `most`, the last say only how many they are."""
    names = [str(name) for name in names]
    if most is not None and len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names) or "none"
