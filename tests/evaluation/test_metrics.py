import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from danet.evaluation.metrics import confusion_matrix, scores


def test_scores_by_hand() -> None:
    """Truth 0 0 1 1 ignored, prediction 0 1 1 1 0: IoU 1/2 and 2/3, accuracy 1/2 and 1."""
    confusion = confusion_matrix(torch.tensor([0, 0, 1, 1, 255]), torch.tensor([0, 1, 1, 1, 0]), 2)
    assert confusion.tolist() == [[1, 1], [0, 2]]
    result = scores(confusion)
    assert result.mean_iou == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result.mean_accuracy == pytest.approx(3 / 4)
    assert result.overall_accuracy == pytest.approx(3 / 4)


def test_absent_classes_are_left_out_of_the_means() -> None:
    result = scores(torch.tensor([[2, 0, 0], [0, 0, 0], [0, 2, 0]]))
    assert result.per_class[1].iou == 0
    assert math.isnan(result.per_class[1].accuracy)
    assert result.mean_accuracy == pytest.approx(1 / 2)
    assert math.isnan(scores(torch.zeros(2, 2)).mean_iou)


labels = arrays.arrays(np.uint8, (6, 7), elements=st.sampled_from([0, 1, 2, 3, 255]))
predictions = arrays.arrays(np.uint8, (6, 7), elements=st.integers(0, 3))


@settings(max_examples=50, deadline=None)
@given(labels, predictions)
def test_matches_counting_pixel_by_pixel(truth: np.ndarray, prediction: np.ndarray) -> None:
    result = scores(confusion_matrix(torch.from_numpy(truth), torch.from_numpy(prediction), 4))
    for k in range(4):
        pixels = [(t, p) for t, p in zip(truth.flat, prediction.flat, strict=True) if t != 255]
        both = sum(t == p == k for t, p in pixels)
        either = sum(k in (t, p) for t, p in pixels)
        expected = both / either if either else math.nan
        assert result.per_class[k].iou == pytest.approx(expected, nan_ok=True)


def test_ids_of_no_class_do_not_count() -> None:
    truth, prediction = torch.tensor([-1, 0, 2]), torch.tensor([0, 0, 0])
    assert confusion_matrix(truth, prediction, 2).tolist() == [[1, 0], [0, 0]]
