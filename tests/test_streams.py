"""Reading ahead and writing behind: in order, few at a time, and nothing raised is lost."""

import threading
import time

import pytest

from knife.streams import ahead, behind


def test_what_is_read_ahead_comes_in_order_and_from_another_thread():
    readers = set()

    def items():
        for i in range(20):
            readers.add(threading.current_thread())
            yield i

    assert [*ahead(items(), lambda item: 1, 3)] == [*range(20)]
    assert len(readers) == 1
    assert threading.current_thread() not in readers


@pytest.mark.parametrize(("weights", "taken"), [([1] * 20, 6), ([7] * 20, 2), ([1, 1, 5, 1, 1, 1, 9], 6)])
def test_no_more_is_read_than_two_portions(weights, taken):
    """The caller works on the first of a portion: that portion and the next have been read."""
    read = []

    def items():
        for weight in weights:
            read.append(weight)
            yield weight

    found = ahead(items(), lambda weight: weight, 3)
    next(found)
    while len(read) < taken:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(read) == taken
    found.close()


def test_what_reading_raises_reaches_the_caller():
    def items():
        yield 1
        yield 2
        raise KeyError("torn")

    found = ahead(items(), lambda item: 1, 2)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(KeyError, match="torn"):
        next(found)


def test_nothing_to_read():
    assert [*ahead([], lambda item: 1, 2)] == []


def test_works_are_done_in_order_in_another_thread():
    done = []

    def work(i):
        done.append((i, threading.current_thread()))
        return i

    assert [*behind(((lambda i=i: work(i)) for i in range(20)), 3)] == [*range(20)]
    assert [i for i, _ in done] == [*range(20)]
    assert len({thread for _, thread in done} - {threading.current_thread()}) == 1


def test_few_works_wait():
    made, allowed = [], threading.Semaphore(0)

    def works():
        for i in range(9):
            made.append(i)
            yield allowed.acquire

    found = behind(works(), 3)
    threading.Timer(0.05, allowed.release).start()
    next(found)  # which waits for the first work
    assert len(made) == 4
    for _ in range(8):
        allowed.release()
    assert len([*found]) == 8


def test_what_a_work_raises_reaches_the_caller_and_ends_it():
    made = []

    def works():
        for i in range(9):
            made.append(i)
            yield lambda i=i: 1 // (2 - i)

    with pytest.raises(ZeroDivisionError):
        [*behind(works(), 1)]
    assert len(made) <= 5


def test_what_was_begun_is_finished_when_making_works_fails():
    done = []

    def works():
        for i in range(3):
            yield lambda i=i: (time.sleep(0.01), done.append(i))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        [*behind(works(), 9)]
    assert done == [0, 1, 2]
