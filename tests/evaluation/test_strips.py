import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danet.evaluation import strips
from danet.evaluation.strips import (
    Mirrored,
    Overlapped,
    Resized,
    Stored,
    average_probabilities,
    most_likely_classes,
)


def logits(classes: int = 21, height: int = 13, width: int = 17, branches: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(classes * height * width)
    return torch.randn(branches, classes, height, width, generator=generator)


def patches(classes: int, height: int, width: int) -> Tensor:
    """Logits as of a trained network: large areas of one class."""
    coarse = F.one_hot(logits(classes, 3, 4).argmax(1), classes).permute(0, 3, 1, 2) * 20.0
    areas = F.interpolate(coarse, size=(height, width), mode="nearest")
    return areas + logits(classes, height, width)


def plain(stored: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(stored, size=size, mode="bilinear", align_corners=align_corners)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "size", [(104, 136), (97, 130), (13, 17), (13, 40), (70, 17), (5, 9), (1, 1), (200, 3)]
)
def test_rows_are_those_of_torchs_interpolation(size: tuple[int, int], align_corners: bool) -> None:
    stored = logits(branches=2)
    resized, expected = (
        Resized(Stored(stored), size, align_corners),
        plain(stored, size, align_corners),
    )
    strips = [(first, min(first + 7, size[0])) for first in range(0, size[0], 7)]
    for first, last in [*strips, (0, size[0])]:
        torch.testing.assert_close(
            resized.rows(first, last), expected[:, :, first:last], rtol=1e-5, atol=2e-6
        )


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("make", [logits, patches])
@pytest.mark.parametrize("classes", [2, 21, 150])
def test_labels_are_those_of_all_logits(classes: int, make, align_corners: bool) -> None:
    stored = make(classes, 33, 64)
    for size in ((264, 512), (257, 505)):
        expected = plain(stored, size, align_corners).argmax(1)
        actual = most_likely_classes([Resized(Stored(stored), size, align_corners)])
        assert actual.dtype == torch.uint8
        assert torch.equal(actual.long(), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_a_class_left_out_never_wins(classes: int, height: int, width: int, seed: int) -> None:
    stored = torch.randn(1, classes, height, width, generator=torch.Generator().manual_seed(seed))
    contends = strips._contenders(stored)
    winners = plain(stored, (height * 8, width * 8), False).argmax(1)[0]
    view = Resized(Stored(stored), (height * 8, width * 8), False)
    for row in range(height * 8):
        top, bottom = view._span(row, row + 1)
        assert contends[winners[row], top:bottom].any(1).all()


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_class_wins_between_pixels_that_it_does_not_win(turned: bool, mirrored: bool) -> None:
    """By hand: logits (10, 0, 4.9) and (0, 10, 9), in the middle (5, 5, 6.95)."""
    stored = torch.tensor([[10.0, 0.0, 4.9], [0.0, 10.0, 9.0]]).T.view(1, 3, 2, 1)
    expected = torch.tensor([0, 0, 0, 2, 2, 1, 1, 1]).view(8, 1)
    if mirrored:
        stored, expected = stored.flip(2), expected.flip(0)
    if turned:
        stored, expected = stored.mT, expected.mT
    view = Resized(Stored(stored.contiguous()), expected.shape, False)
    assert most_likely_classes([view])[0].tolist() == expected.tolist()


def test_few_classes_contend_where_areas_are_large() -> None:
    assert strips._contenders(patches(150, 33, 64)).float().mean() < 0.2
    assert strips._contenders(torch.zeros(1, 150, 5, 5)).all()


def test_the_first_of_equal_classes_is_taken() -> None:
    stored = torch.zeros(1, 5, 4, 4)
    assert most_likely_classes([Resized(Stored(stored), (32, 32), False)]).max() == 0
    assert most_likely_classes([Stored(stored)]).max() == 0


def test_scores_are_averaged_over_views_of_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_CPU_STRIP_ELEMENTS", 1)  # the shortest strips
    size, sources = (50, 70), [logits(9, 7, 9), logits(9, 13, 18)]
    view_sizes = [(25, 35), (75, 105)]
    views, scores = [], []
    for stored, view_size in zip(sources, view_sizes, strict=True):
        full = plain(stored, view_size, False)
        for mirrored in (False, True):
            view = Resized(Stored(stored), view_size, False)
            views.append(Resized(Mirrored(view) if mirrored else view, size, False))
            scores.append(plain(full.flip(-1) if mirrored else full, size, False).softmax(1))
    expected = torch.stack(scores).mean(0)
    torch.testing.assert_close(average_probabilities(views), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(most_likely_classes(views).long(), expected.argmax(1))


def test_overlapping_windows_are_averaged() -> None:
    first, second = logits(3, 10, 12), logits(4, 10, 12)[:, :3]
    windows = [
        (slice(0, 10), slice(0, 12), Stored(first)),
        (slice(6, 14), slice(5, 15), Stored(second)),  # reaches beyond the picture
        (slice(6, 14), slice(0, 12), Stored(first)),
        (slice(0, 6), slice(12, 15), Stored(second)),
    ]
    rows = Overlapped((14, 15), windows).rows(0, 14)
    assert torch.equal(rows[..., 0, 0], first[..., 0, 0])
    torch.testing.assert_close(
        rows[..., 7, 6], (first[..., 7, 6] + second[..., 1, 1] + first[..., 1, 6]) / 3
    )


def test_classes_of_any_branch_contend() -> None:
    stored = torch.zeros(2, 3, 4, 4)
    stored[0, 0] = stored[1, 2] = 9
    found = most_likely_classes([Resized(Stored(stored), (32, 32), False)])
    assert [labels.unique().tolist() for labels in found] == [[0], [2]]


def test_strips_of_long_rows_are_low() -> None:
    wide = Stored(torch.zeros(1, 21, 100, 4096))
    assert list(strips._strips(wide)) == [(0, 48), (48, 96), (96, 100)]
