"""What went wrong where the input was right: whether it passes by itself, and what to do where it does not."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# What a network or a network file system says when it is busy, or away for a moment. EIO is among them: of a local disk
# it means damage, which another attempt finds again.
PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENOLCK,
    errno.ENOTCONN,
    errno.ESTALE,
}
FULL = (
    "the disk is full{where}: free some space and run this again; what was made before stays, and training goes on "
    "from its checkpoint"
)
READ_ONLY = (
    "the file system is read-only{where}: make it writable, or give another folder with --root, and run this again"
)
FORBIDDEN = "this user may not read or write a file{where}: change its owner or permissions, and run this again"
TOO_LARGE = (
    "a file would grow beyond what this process may write{where}: lift the limit with `ulimit -f unlimited`, or use a "
    "file system that takes larger files, and run this again"
)
TOO_MANY = "too many files are open: raise the limit, as `ulimit -n 4096` does, and run this again"
# What the system says of its limits, by number and in its words: libraries that write files by themselves pass on the
# words alone.
LIMITS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: READ_ONLY,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EFBIG: TOO_LARGE,
    errno.EMFILE: TOO_MANY,
    errno.ENFILE: TOO_MANY,
}
IN_WORDS = {os.strerror(number): sentence for number, sentence in LIMITS.items() if number != errno.EPERM}
NO_MEMORY_IN_WORDS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
OTHERS_HOLD = 0.05  # of a card's memory: as much as a context of our own may take beside torch's pool


@dataclass(frozen=True)
class Diagnosis:
    """For a person: what happened, and what to do."""

    sentence: str
    passes: bool  # by itself: the same again, a little later, may go well


def diagnose(error: BaseException) -> Diagnosis | None:
    """What an error means, by itself or by what it was raised from; None where that is not known.

    An InputError is not known here, for it says itself what to do, unless it comes of something that passes: a hub that
    did not answer makes "the base model cannot be loaded".
    """
    for link in _chain(error):
        if diagnosis := _of_one(link):
            return diagnosis
    return None


def _of_one(error: BaseException) -> Diagnosis | None:
    number = error.errno if isinstance(error, OSError) else None
    if sentence := LIMITS.get(number or 0) or next(
        (IN_WORDS[words] for words in IN_WORDS if words in str(error)), None
    ):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return Diagnosis(sentence.format(where=where), passes=False)
    torch: Any = sys.modules.get("torch")  # who never imported it has not exhausted its memory
    if torch and isinstance(error, torch.OutOfMemoryError):
        return _card_is_full(torch)
    compiling: Any = sys.modules.get("torch._dynamo.exc")
    if compiling and isinstance(error, compiling.TorchDynamoException):
        cause = getattr(error, "inner_exception", error)
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        return Diagnosis(
            f"the transformer blocks cannot be compiled here ({said}): write compile: false in params.yaml, and run "
            "this again",
            passes=False,
        )
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(w in str(error) for w in NO_MEMORY_IN_WORDS):
        return Diagnosis(
            "the memory of this machine does not suffice: end other programs, or set micro_batch: 1 or "
            "gradient_checkpointing: true in params.yaml, and run this again",
            passes=False,
        )
    if isinstance(error, ConnectionError | TimeoutError | ChildProcessError) or number in PASSING:
        return _interrupted(error)
    if isinstance(error, socket.gaierror) and number == socket.EAI_AGAIN:
        return _interrupted(error)
    return None


def _interrupted(error: BaseException) -> Diagnosis:
    said = str(error).strip() or type(error).__name__
    return Diagnosis(f"something that this needs did not answer ({said}); run it again when it does", passes=True)


def _card_is_full(torch: Any) -> Diagnosis:
    """It passes where others hold the memory, for they will end; our own need does not shrink by waiting."""
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    if others > OTHERS_HOLD * total:
        return Diagnosis(
            f"the graphics card's memory is full, and other processes hold {others / 2**30:.1f} of its "
            f"{total / 2**30:.1f} GiB: end them, or let one run at a time use the card",
            passes=True,
        )
    return Diagnosis(
        f"the graphics card's {total / 2**30:.1f} GiB do not suffice: set micro_batch: auto, "
        "gradient_checkpointing: true or precision: bf16 in params.yaml, and run this again; "
        "docs/memory.md says what each method needs",
        passes=False,
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
