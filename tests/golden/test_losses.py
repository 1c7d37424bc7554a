import pytest

from golden import losses


@pytest.mark.slow
def test_the_first_50_losses_are_the_recorded_ones() -> None:
    rows = losses.measured()
    assert losses.largest_difference(rows, losses.recorded()) < losses.RELATIVE_TOLERANCE


def test_a_difference_is_seen() -> None:
    record = losses.recorded()
    changed = [dict(row) for row in record]
    changed[30]["loss_channel"] *= 1.1
    assert losses.largest_difference(record, record) == 0
    assert losses.largest_difference(changed, record) == pytest.approx(0.1)
