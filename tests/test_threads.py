import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from danet.threads import map_ahead


def test_results_come_in_order_and_few_are_made_ahead() -> None:
    begun: list[int] = []
    may_end = threading.Event()

    def square(number: int) -> int:
        begun.append(number)
        if number == 0:
            may_end.wait(10)  # the first is the last to be ready
        return number**2

    with ThreadPoolExecutor(3) as pool:
        threading.Timer(0.1, may_end.set).start()
        found = []
        for number, result in map_ahead(pool, square, iter(range(20)), 4):
            found.append((number, result))
            assert max(begun) <= number + 4
    assert found == [(number, number**2) for number in range(20)]


def test_an_error_comes_at_its_items_turn() -> None:
    with ThreadPoolExecutor(2) as pool:
        results = map_ahead(pool, lambda divisor: 1 / divisor, [1, 2, 0, 4], 3)
        assert [next(results), next(results)] == [(1, 1.0), (2, 0.5)]
        with pytest.raises(ZeroDivisionError):
            next(results)
