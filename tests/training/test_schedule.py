import pytest
from pydantic import ValidationError

from danet.config import TrainConfig
from danet.training.schedule import learning_rate


def test_published_poly_schedule_by_hand() -> None:
    config = TrainConfig(steps=40_000)
    assert learning_rate(0, config) == 0.01
    assert learning_rate(20_000, config) == pytest.approx(0.0099 * 0.5**0.9 + 1e-4)
    assert learning_rate(39_999, config) == pytest.approx(1e-4, rel=0.01)


def test_matches_the_recurrence_that_mmengine_steps() -> None:
    """PolyParamScheduler multiplies (lr - eta_min) by (1 - 1 / (total - t + 1))^power each step.

    Its total is one less than its `end`, so it has mmcv's published schedule with end = steps + 1.
    """
    config = TrainConfig(steps=200)
    rate = config.lr
    for step in range(1, 200):
        shrink = (1 - 1 / (config.steps - step + 1)) ** config.lr_power
        rate = (rate - config.lr_min) * shrink + config.lr_min
        assert learning_rate(step, config) == pytest.approx(rate, rel=1e-9)


def test_warm_up_rises_linearly_to_the_schedule() -> None:
    config = TrainConfig(steps=100, warmup_steps=4, lr_min=0)
    plain = TrainConfig(steps=100, lr_min=0)
    factors = [learning_rate(step, config) / learning_rate(step, plain) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_a_floor_above_the_rate_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"lr_min .* is above lr"):
        TrainConfig(lr=1e-5, lr_min=1e-4)
