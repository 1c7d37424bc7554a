import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import danet
from danet import inspection
from danet.evaluation.strips import LogitRows
from danet.inspection import Inspection
from networks import attentive_danet
from pictures import HEIGHT, WIDTH


@pytest.fixture(scope="module")
def seen(predictor: danet.Predictor, image: Image.Image) -> Inspection:
    return Inspection(predictor, image)


def reduced_features(image: Image.Image, branch: str) -> tuple[danet.DANet, torch.Tensor]:
    """What a branch's attention reads, by the plain network in float64."""
    model = attentive_danet().double()
    metadata = model.metadata
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (metadata.mean, metadata.std))
    with torch.no_grad():
        c4 = model.backbone(((pixels - mean) / std).unsqueeze(0)).c4
        return model, getattr(model.head, f"{branch}_branch").reduce(c4)


def attention_matrix(image: Image.Image) -> torch.Tensor:
    """Equation (1) as two loops, N x N."""
    model, features = reduced_features(image, "position")
    module = model.head.position_branch.attention
    with torch.no_grad():
        query, key = module.query(features)[0].flatten(1), module.key(features)[0].flatten(1)
    positions = query.shape[1]
    matrix = torch.zeros(positions, positions, dtype=torch.float64)
    for j in range(positions):
        for i in range(positions):
            matrix[j, i] = math.exp(float(query[:, j] @ key[:, i]))
        matrix[j] /= matrix[j].sum()
    return matrix


def test_a_pixels_attention_is_its_cells_row_of_the_matrix(
    seen: Inspection, image: Image.Image
) -> None:
    matrix = attention_matrix(image).view(5, 7, 5, 7)
    # 50 x 37 pixels are 7 x 5 cells: pixel 0 is in cell 0, pixel 49 in cell 6, pixel 36 in cell 4.
    for point, (row, column) in {
        (0, 0): (0, 0),
        (49, 36): (4, 6),
        (25, 18): (2, 3),
        (7, 8): (1, 0),
    }.items():
        found = seen.attention(point)
        assert found.shape == (5, 7)
        np.testing.assert_allclose(found, matrix[row, column].numpy(), rtol=1e-4)


def test_received_attention_is_the_mean_of_all_rows(seen: Inspection, image: Image.Image) -> None:
    expected = attention_matrix(image).mean(0).view(5, 7).numpy()
    np.testing.assert_allclose(seen.received_attention(), expected, rtol=1e-4)
    assert seen.received_attention().sum() == pytest.approx(1)


def test_attention_is_as_exact_within_autocast(seen: Inspection) -> None:
    expected = seen.attention((30, 20))
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(seen.attention((30, 20)), expected)


def test_received_attention_does_not_depend_on_the_block(
    seen: Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = seen.received_attention()
    monkeypatch.setattr("danet.inspection._QUERY_BLOCK", 4)
    monkeypatch.setattr(seen, "_received", None)
    np.testing.assert_allclose(seen.received_attention(), whole, rtol=1e-5)


def test_scores_and_classes_are_the_predictors(
    seen: Inspection, predictor: danet.Predictor, image: Image.Image
) -> None:
    expected = predictor(image, probabilities=True)
    np.testing.assert_array_equal(seen.branches["fused"], expected.classes)
    assert expected.probabilities is not None
    for column, row in [(0, 0), (49, 36), (20, 11)]:
        score = seen.score((column, row))
        assert score.class_id == expected.classes[row, column]
        assert score.probability == pytest.approx(
            expected.probabilities[:, row, column].max(), abs=1e-5
        )


def test_disagreement_is_where_any_branch_differs(seen: Inspection) -> None:
    assert set(seen.branches) == {"fused", "position", "channel"}
    fused, position, channel = (seen.branches[name] for name in ("fused", "position", "channel"))
    for row in range(HEIGHT):
        for column in range(WIDTH):
            opinions = {int(b[row, column]) for b in (fused, position, channel)}
            assert seen.disagreement[row, column] == (len(opinions) > 1)


def test_channels_by_hand(seen: Inspection, image: Image.Image) -> None:
    model, features = reduced_features(image, "channel")
    flat = features[0].flatten(1)
    energy = flat @ flat.T
    shares = (energy.amax(1, keepdim=True) - energy).softmax(1)
    with torch.no_grad():
        response = model.head.channel_branch.attention(features)[0]
    channels = seen.channels()
    assert [c.strength for c in channels] == sorted((c.strength for c in channels), reverse=True)
    assert sorted(c.channel for c in channels) == list(range(16))
    for channel in channels:
        own = shares[channel.channel]
        expected = response[channel.channel]
        np.testing.assert_allclose(channel.response, expected.numpy(), rtol=1e-3, atol=1e-5)
        assert channel.strength == pytest.approx(float(expected.std(correction=0)), rel=1e-3)
        entropy = -float((own * own.clamp(min=1e-300).log()).sum())
        assert channel.selectivity == pytest.approx(1 - entropy / math.log(16), abs=1e-4)
        assert channel.attends_to[0][1] == pytest.approx(float(own.max()), abs=1e-4)
        # Cells' centres are pixels 3, 10, .. of 50 and 3, 11, .. of 37.
        classes = seen.branches["fused"]
        sums: dict[int, list[float]] = {}
        for row in range(5):
            for column in range(7):
                at = classes[(2 * row + 1) * HEIGHT // 10, (2 * column + 1) * WIDTH // 14]
                sums.setdefault(int(at), []).append(float(expected[row, column]))
        means = {index: sum(values) / len(values) for index, values in sums.items()}
        assert means[channel.responds_to] == pytest.approx(max(means.values()), abs=1e-5)


def test_passes_of_other_threads_are_not_recorded(
    predictor: danet.Predictor, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread segments a picture of another size while this one's is inspected."""
    real = inspection.views

    def disturbed(*arguments: Any) -> list[list[LogitRows]]:
        found = real(*arguments)
        other = threading.Thread(target=predictor, args=(image.resize((90, 80)),))
        other.start()
        other.join()
        return found

    expected = Inspection(predictor, image)
    monkeypatch.setattr(inspection, "views", disturbed)
    found = Inspection(predictor, image)
    np.testing.assert_array_equal(found.attention((25, 18)), expected.attention((25, 18)))
    np.testing.assert_array_equal(found.received_attention(), expected.received_attention())
    for channel, other in zip(found.channels(), expected.channels(), strict=True):
        np.testing.assert_array_equal(channel.response, other.response)
