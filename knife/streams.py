"""Reading ahead and writing behind: one thread each, so that the network never waits for a disk.

Both keep the order, hold few things at a time, and pass on whatever is raised to whoever takes the results.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], weight: Callable[[T], int], enough: int) -> Generator[T, None, None]:
    """Yield items that a thread takes out of an iterable while the caller works with the ones before.

    The thread takes as many as weigh `enough` together, waits until the caller begins with these, and takes the next.
    """
    source = iter(items)

    def some() -> list[T]:
        taken, held = list[T](), 0
        for item in source:
            taken.append(item)
            held += weight(item)
            if held >= enough:
                break
        return taken

    with ThreadPoolExecutor(1, "knife-reads") as thread:
        coming = thread.submit(some)
        while now := coming.result():
            coming = thread.submit(some)
            yield from now


def behind(works: Iterable[Callable[[], T]], most: int) -> Generator[T, None, None]:
    """Do works in a thread while the caller's own makes the next, and yield what they return; at most `most` wait.

    If the iterable raises, the works before are done first.
    """
    waiting = deque[Future[T]]()
    with ThreadPoolExecutor(1, "knife-writes") as thread:
        for work in works:
            waiting.append(thread.submit(work))
            while waiting and (waiting[0].done() or len(waiting) > most):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
