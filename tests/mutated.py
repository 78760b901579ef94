"""Damaged copies of a file: flipped bits, cut ends, doubled and lost pieces, and values of another type."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError

OTHERS = (
    b"null", b"true", b"-1", b"1e999", b".inf", b".nan", b'"\\ud800"', b"[]", b"{}", b'"x"', b"[" * 2000, b"9" * 5000,
    b'{"a": {"b": [1]}}', b"\xff\xfe", b"\xef\xbb\xbf", b"&a", b"*a", b"!!python/object:os.system", b"!!timestamp 1",
    b"2026-99-99", b"\0", b"<<", b"0x", b"1:99:99", b"''",
)  # fmt: skip
_VALUE = re.compile(rb'"[^"\n]*"|[\w.@/<>-]+')


def mutants(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged copies; the same ones each time."""
    draw = random.Random(seed)
    values = [found.span() for found in _VALUE.finditer(content)]
    for number in range(count):
        changed = bytearray(content)
        place, kind = draw.randrange(len(content)), number % 5
        if kind == 0:
            for _ in range(draw.randint(1, 3)):
                changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            length = draw.randint(1, 20)
            changed[place:place] = content[(start := draw.randrange(len(content))) : start + length]
        elif kind == 3:
            del changed[place : place + draw.randint(1, 20)]
        elif values:
            start, end = draw.choice(values)
            changed[start:end] = draw.choice(OTHERS)
        yield bytes(changed)


def put(path: Path, content: bytes) -> None:
    """Write a file in place: thousands of times in a second, where making it anew takes milliseconds."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(content)
        file.truncate()


def outcomes(content: bytes, read: Callable[[bytes], Any], count: int = 2000, seed: int = 0) -> tuple[int, int]:
    """How many of the damaged copies were read, and how many refused.

    Raises:
        Whatever `read` raises but InputError; and AssertionError, where a refusal is no short, printable text.
    """
    accepted = refused = 0
    for one in mutants(content, count, seed):
        try:
            read(one)
            accepted += 1
        except InputError as error:
            assert 10 < len(str(error)) < 4000
            str(error).encode()
            refused += 1
        except Exception as error:
            error.add_note(f"reading {one[:2000]!r}")
            raise
    return accepted, refused
