"""The learning rate as a pure function of the step."""

from danet.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Poly schedule per step with a floor, after an optional linear warm-up.

    lr(t) = (lr - lr_min) (1 - t / steps)^power + lr_min, as mmcv's PolyLrUpdaterHook, which
    the published models used; with lr_min = 0 it is the authors'.

    Args:
        step: 0-based.
    """
    remaining = 1 - step / config.steps
    rate: float = (config.lr - config.lr_min) * remaining**config.lr_power + config.lr_min
    if step < config.warmup_steps:
        rate *= (step + 1) / (config.warmup_steps + 1)
    return rate
