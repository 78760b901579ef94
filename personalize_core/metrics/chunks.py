"""Images in chunks, several chunks at once: what has to be encoded is read and prepared beside the network's work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from personalize_core.metrics.encoders import BATCH_SIZE

Item = TypeVar("Item")
Result = TypeVar("Result")


def even_chunks(count: int, most: int = BATCH_SIZE) -> list[range]:
    """Places 0 to count - 1 in order, in as few chunks of at most `most` as suffice, of nearly equal size.

    It depends on nothing else, so that an image is always encoded beside the same others.
    """
    chunks = -(-count // most)
    bounds = [number * count // chunks for number in range(chunks + 1)] if chunks else [0]
    return [range(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]


def in_workers(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """The results in the items' order, computed in several threads of this process.

    While one thread waits for a file or holds Python's lock, another computes: torch, Pillow and zlib release it. The
    threads share the cores that torch has been given, so each computes on one of them if there are as many threads as
    cores. At most two items per thread are taken up before their results are fetched.

    Args:
        workers: threads, at most.
    """
    threads = min(workers, len(items))
    if threads <= 1:
        yield from map(function, items)
        return
    cores = torch.get_num_threads()
    waiting, rest = deque[Future[Result]](), iter(items)
    pool = ThreadPoolExecutor(threads, "encode", torch.set_num_threads, (max(1, cores // threads),))
    try:
        for item in rest:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # of the threads that begin after this; a setting is each thread's own
