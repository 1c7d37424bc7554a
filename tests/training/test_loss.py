import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from danet.config import TrainConfig
from danet.model import DANetOutput
from danet.training.loss import hard_examples, loss_divisor, segmentation_losses


def nearest(logits: Tensor, size) -> Tensor:
    return F.interpolate(logits, size=tuple(size))


def losses(config: TrainConfig, output: DANetOutput, labels: Tensor) -> dict[str, Tensor]:
    divisor = loss_divisor(labels, config)
    return segmentation_losses(output, labels, divisor, nearest, config)


def test_cross_entropy_by_hand() -> None:
    """Two classes, four pixels, one ignored; logits (0, log 3) give probabilities 1/4, 3/4."""
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    output = DANetOutput(logits, None, None, None)
    labels = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
    summed = -math.log(1 / 4) - 2 * math.log(3 / 4)
    assert losses(TrainConfig(), output, labels)["loss"].item() == pytest.approx(summed / 4)
    valid = losses(TrainConfig(loss_divisor="valid"), output, labels)
    assert valid["loss"].item() == pytest.approx(summed / 3)


def test_the_parts_are_weighted() -> None:
    torch.manual_seed(0)
    output = DANetOutput(*torch.randn(4, 2, 5, 3, 3))
    labels = torch.randint(0, 5, (2, 6, 6)).to(torch.uint8)
    result = losses(TrainConfig(branch_loss_weight=0.5, auxiliary_loss_weight=0.4), output, labels)
    assert result["loss"].item() == pytest.approx(
        (
            result["loss_fused"]
            + 0.5 * (result["loss_position"] + result["loss_channel"])
            + 0.4 * result["loss_auxiliary"]
        ).item(),
        rel=1e-6,
    )
    expected = F.cross_entropy(nearest(output.fused, (6, 6)), labels.long())
    assert result["loss_fused"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("divisor", ["all", "valid"])
def test_nothing_labelled_is_no_loss(divisor: str) -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    labels = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    result = losses(
        TrainConfig(loss_divisor=divisor), DANetOutput(logits, None, None, None), labels
    )
    result["loss"].backward()
    assert result["loss"].item() == 0
    assert not logits.grad.any()


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(1, 3, 2, 2).bfloat16()
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    result = losses(TrainConfig(), DANetOutput(logits, None, None, None), labels)
    assert result["loss"].dtype == torch.float32


def reference_loss(logits: Tensor, labels: Tensor, weights: list[float]) -> tuple[float, float]:
    """Pixel by pixel: the weighted sum of -log p, and the sum of the weights."""
    total = weight = 0.0
    for sample, row, column in itertools.product(*map(range, labels.shape)):
        label = int(labels[sample, row, column])
        if label == 255:
            continue
        scores = logits[sample, :, row, column].tolist()
        log_sum = math.log(sum(math.exp(score) for score in scores))
        total += weights[label] * (log_sum - scores[label])
        weight += weights[label]
    return total, weight


@pytest.mark.parametrize("divisor", ["all", "valid"])
def test_class_weights_pixel_by_pixel(divisor: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4)
    labels = torch.randint(0, 4, (2, 4, 4)).to(torch.uint8)
    labels[labels == 3] = 255
    weights = [0.5, 2.0, 1.25]
    total, weight = reference_loss(logits, labels, weights)
    config = TrainConfig(loss_divisor=divisor, class_weights=tuple(weights))
    result = losses(config, DANetOutput(logits, None, None, None), labels)
    expected = total / (labels.numel() if divisor == "all" else weight)
    assert result["loss"].item() == pytest.approx(expected, rel=1e-5)
    if divisor == "valid":
        torchs = F.cross_entropy(logits, labels.long(), torch.tensor(weights), ignore_index=255)
        assert result["loss"].item() == pytest.approx(torchs.item(), rel=1e-5)


class TestHardExamples:
    """One pixel a column; the true class's probabilities are known."""

    probabilities = torch.tensor([0.9, 0.2, 0.6, 0.8, 0.4])

    def kept(self, threshold: float, min_kept: int, ignored: int | None = None) -> list[int]:
        logits = torch.stack([self.probabilities, 1 - self.probabilities]).log().view(1, 2, 1, 5)
        target = torch.zeros(1, 1, 5, dtype=torch.long)
        if ignored is not None:
            target[..., ignored] = 255
        hard = hard_examples(logits, target, threshold, min_kept)
        return hard.flatten().nonzero().flatten().tolist()

    def test_below_the_threshold(self) -> None:
        assert self.kept(0.7, 1) == [1, 2, 4]

    def test_at_least_the_hardest(self) -> None:
        assert self.kept(0.3, 3) == [1, 2, 4]

    def test_fewer_labelled_than_to_keep(self) -> None:
        assert self.kept(0.3, 9) == [1, 2, 3, 4]
        assert self.kept(0.3, 4, ignored=0) == [1, 2, 4]

    def test_ignored_pixels_are_not_kept(self) -> None:
        assert self.kept(0.7, 1, ignored=1) == [2, 4]

    def test_ignored_pixels_are_not_ranked(self) -> None:
        assert self.kept(0.1, 1, ignored=1) == [4]

    def test_so_many_are_kept_of_each_picture(self) -> None:
        p = torch.tensor([0.9, 0.2, 0.6, 0.8, 0.4])
        logits = torch.stack([p, 1 - p]).log().view(1, 2, 1, 5).repeat(2, 1, 1, 1)
        logits[1] = torch.tensor([0.95, 0.05]).log().view(2, 1, 1)
        hard = hard_examples(logits, torch.zeros(2, 1, 5, dtype=torch.long), 0.1, 2)
        assert hard[0].flatten().nonzero().flatten().tolist() == [1, 2, 3, 4]

    def test_they_are_the_whole_batchs(self) -> None:
        torch.manual_seed(0)
        config = TrainConfig(hard_example_threshold=0.01, hard_example_min_kept=4)
        labels = torch.randint(0, 3, (3, 8, 8)).to(torch.uint8)
        logits = torch.randn(3, 3, 8, 8)
        output = DANetOutput(logits, None, None, None)
        divisor = loss_divisor(labels, config)
        found = segmentation_losses(output, labels, divisor, lambda full, _: full, config)["loss"]
        target = labels.long()
        target = target.where(hard_examples(logits, target, 0.01, 4), 255)
        expected = F.cross_entropy(logits, target, ignore_index=255, reduction="sum")
        torch.testing.assert_close(found, expected / labels.numel())

    def test_pixels_without_labels_are_never_hard(self) -> None:
        target = torch.full((1, 1, 5), 255)
        assert not hard_examples(torch.randn(1, 2, 1, 5), target, 0.7, 1).any()

    def test_only_they_count(self) -> None:
        logits = torch.stack([self.probabilities, 1 - self.probabilities]).log().view(1, 2, 1, 5)
        labels = torch.zeros(1, 1, 5, dtype=torch.uint8)
        config = TrainConfig(hard_example_threshold=0.7, hard_example_min_kept=1)
        result = losses(config, DANetOutput(logits, None, None, None), labels)
        expected = -(math.log(0.2) + math.log(0.6) + math.log(0.4)) / 5
        assert result["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"hard_example_threshold": 0.5}], ids=["all", "hard"])
@pytest.mark.parametrize("divisor", ["all", "valid"])
def test_gradients_are_those_of_the_whole_batch_at_once(divisor: str, settings) -> None:
    """Against torch's cross-entropy on the batch, kept for its own backward pass."""
    torch.manual_seed(0)
    config = TrainConfig(
        loss_divisor=divisor, class_weights=(0.5, 2.0, 1.25), hard_example_min_kept=4, **settings
    )
    labels = torch.randint(0, 4, (3, 8, 8)).to(torch.uint8)
    labels[labels == 3] = 255
    ours = torch.randn(3, 3, 4, 4)
    theirs = ours.clone()
    ours.requires_grad_()
    theirs.requires_grad_()
    (3 * losses(config, DANetOutput(ours, None, None, None), labels)["loss"]).backward()
    full_size, target = nearest(theirs, (8, 8)), labels.long()
    if settings:
        target = target.where(hard_examples(full_size, target, 0.5, 4), 255)
    weights = torch.tensor(config.class_weights)
    summed = F.cross_entropy(full_size, target, weights, ignore_index=255, reduction="sum")
    (3 * summed / loss_divisor(labels, config)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.any()


def test_full_size_logits_are_held_for_one_picture_at_a_time() -> None:
    held: list[int] = []

    def count(logits: Tensor, size) -> Tensor:
        held.append(len(logits))
        return nearest(logits, size)

    config, labels = TrainConfig(), torch.zeros(3, 8, 8, dtype=torch.uint8)
    output = DANetOutput(torch.randn(3, 2, 4, 4), None, None, None)
    segmentation_losses(output, labels, loss_divisor(labels, config), count, config)
    assert held == [1, 1, 1]
