"""Many small jobs in threads: results in order, memory bounded, Ctrl-C obeyed at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from segdeformer.cores import num_cores

T = TypeVar("T")

AHEAD = 4  # jobs begun or waiting per thread: enough to keep it busy, few enough to bound memory
MOST_WORKERS = 16


def in_threads(jobs: Iterable[Callable[[], T]], *, workers: int | None = None) -> Iterator[T]:
    """The jobs' results in their order. Threads serve where OpenCV, zlib and hashing leave Python's lock.

    workers: threads; a thread for every core if None, up to 16.
    When it is closed, or a job or Ctrl-C raises, jobs that have not begun are dropped.
    """
    workers = workers or min(num_cores(), MOST_WORKERS)
    executor = ThreadPoolExecutor(workers)
    waiting: deque[Future[T]] = deque()
    try:
        for job in jobs:
            waiting.append(executor.submit(job))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
