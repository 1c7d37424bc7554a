import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import danet
from danet.config import TestConfig
from danet.errors import LogitsNotFinite
from danet.evaluation.inference import predict_classes, predict_probabilities, view_sizes
from networks import tiny_danet


@pytest.fixture(scope="module")
def model() -> danet.DANet:
    network = tiny_danet(4)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "residual_weight" in name:
                tensor.fill_(0.8)
            if "classifier" in name:
                tensor.mul_(20)  # so that argmax is not decided by rounding
    return network


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randint(0, 256, (3, 50, 70), generator=torch.Generator().manual_seed(1)).byte()


def plain_logits(model: danet.DANet, image: Tensor) -> Tensor:
    """One pass, written out: normalise, network, bilinear to the input's size."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.metadata.mean, model.metadata.std))
    pixels = ((image.float() - mean) / std)[None]
    return F.interpolate(model(pixels).fused, size=image.shape[1:], mode="bilinear")[0]


def test_whole_picture(model: danet.DANet, image: Tensor) -> None:
    with torch.inference_mode():
        expected = plain_logits(model, image)
        actual = predict_probabilities(model, image, TestConfig())
        classes = predict_classes(model, image, TestConfig())[0]
    torch.testing.assert_close(actual, expected.softmax(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(classes.long(), expected.argmax(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "test",
    [
        TestConfig(),
        TestConfig(flip=True, ratios=(0.5, 1.0)),
        TestConfig(mode="slide", window=(32, 32), stride=(24, 24)),
    ],
)
def test_logits_that_are_not_finite_are_refused(
    model: danet.DANet, image: Tensor, test: TestConfig, value: float
) -> None:
    """Of one class suffice: interpolation makes infinite ones undefined."""
    damaged = copy.deepcopy(model)
    damaged.head.fused_classifier[1].bias.data[1] = value
    for predict in (predict_classes, predict_probabilities):
        with pytest.raises(LogitsNotFinite, match=r"not finite.*--precision fp32"):
            predict(damaged, image, test)


def test_branches_are_their_classifiers(model: danet.DANet, image: Tensor) -> None:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.metadata.mean, model.metadata.std))
    with torch.inference_mode():
        output = model(((image.float() - mean) / std)[None])
        classes = predict_classes(model, image, TestConfig(), ("channel", "fused", "position"))
    for index, name in enumerate(("channel", "fused", "position")):
        logits = F.interpolate(getattr(output, name), size=(50, 70), mode="bilinear")[0]
        assert (classes[index] == logits.argmax(0)).float().mean() > 0.999


def mmseg_windows(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """How mmsegmentation's slide_inference lays windows, written from its rule."""
    count = max(length - window + stride - 1, 0) // stride + 1
    spans = []
    for index in range(count):
        end = min(index * stride + window, length)
        spans.append((max(end - window, 0), end))
    return spans


@pytest.mark.parametrize(
    ("window", "stride", "batch_size"),
    [
        ((32, 32), (20, 20), 1),
        ((32, 24), (32, 24), 4),
        ((40, 30), (13, 9), 3),
        ((99, 99), (9, 9), 2),
    ],
)
def test_sliding_windows_average_the_logits(
    model: danet.DANet, image: Tensor, window, stride, batch_size: int
) -> None:
    total, count = torch.zeros(4, 50, 70), torch.zeros(50, 70)
    test = TestConfig(mode="slide", window=window, stride=stride, batch_size=batch_size)
    with torch.inference_mode():
        for top, bottom in mmseg_windows(50, min(window[1], 50), stride[1]):
            for left, right in mmseg_windows(70, min(window[0], 70), stride[0]):
                total[:, top:bottom, left:right] += plain_logits(
                    model, image[:, top:bottom, left:right]
                )
                count[top:bottom, left:right] += 1
        expected = (total / count).softmax(0)
        actual = predict_probabilities(model, image, test)
    assert (count > 0).all()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_scales_and_flips_average_the_probabilities(model: danet.DANet, image: Tensor) -> None:
    views = []
    with torch.inference_mode():
        for width, height in ((35, 25), (70, 50), (105, 75)):
            resized = F.interpolate(
                image[None].float(), size=(height, width), mode="bilinear"
            ).round()[0]
            for mirrored in (False, True):
                logits = plain_logits(model, resized.flip(-1) if mirrored else resized)
                logits = logits.flip(-1) if mirrored else logits
                full = F.interpolate(logits[None], size=(50, 70), mode="bilinear")[0]
                views.append(full.softmax(0))
        expected = torch.stack(views).mean(0)
        test = TestConfig(ratios=(0.5, 1.0, 1.5), flip=True)
        actual = predict_probabilities(model, image, test)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=5e-3)
    np.testing.assert_allclose(actual.sum(0), 1, rtol=1e-5)


def test_corners_are_aligned_in_every_resizing_of_logits(image: Tensor) -> None:
    """At twice the size, where multiples of 16 are resized to whole numbers."""
    network = tiny_danet(4, align_corners=True)
    coarse = (image // 16 * 16).float()
    with torch.inference_mode():
        doubled = F.interpolate(coarse[None], scale_factor=2, mode="bilinear")[0]
        mean, std = (
            torch.tensor(v).view(3, 1, 1) for v in (network.metadata.mean, network.metadata.std)
        )
        logits = network(((doubled - mean) / std)[None]).fused
        for size in ((100, 140), (50, 70)):
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
        actual = predict_probabilities(network, coarse.byte(), TestConfig(ratios=(2.0,)))
    torch.testing.assert_close(actual, logits.softmax(1)[0], rtol=1e-4, atol=1e-5)


def test_pictures_are_shrunk_without_smoothing(model: danet.DANet) -> None:
    """To a quarter by the middle two of four pixels, as mmsegmentation does; here these are 0."""
    picture = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    picture[..., 1::4] = picture[..., 2::4] = 0
    read: list[Tensor] = []
    hook = model.backbone.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with hook:
        predict_classes(model, picture, TestConfig(ratios=(0.25,)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.metadata.mean, model.metadata.std))
    torch.testing.assert_close(read[0], (-mean / std).expand(1, 3, 16, 16))


def test_a_symmetric_picture_stays_symmetric_with_flips(model: danet.DANet, image: Tensor) -> None:
    symmetric = torch.cat([image, image.flip(-1)], dim=-1)
    scores = predict_probabilities(model, symmetric, TestConfig(flip=True))
    torch.testing.assert_close(scores, scores.flip(-1), rtol=1e-4, atol=1e-5)


def test_one_pixel(model: danet.DANet) -> None:
    pixel = torch.zeros(3, 1, 1, dtype=torch.uint8)
    test = TestConfig(mode="slide", ratios=(0.5, 1.75), flip=True)
    assert predict_classes(model, pixel, test).shape == (1, 1, 1)


@torch.no_grad()
def test_a_view_of_one_pixel(model: danet.DANet) -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    labels = predict_classes(model, image, TestConfig(ratios=(0.02,), ratios_of="image"))
    assert labels.shape == (1, 5, 7)


def test_windows_over_the_border_are_filled_with_black(model: danet.DANet, image: Tensor) -> None:
    """The authors' form: one grid, and pixels of value 0 beyond the picture."""
    total, count = torch.zeros(4, 50, 70), torch.zeros(50, 70)
    with torch.inference_mode():
        for top in (0, 24):
            for left in (0, 24, 48):
                window = torch.zeros(3, 32, 32, dtype=torch.uint8)
                part = image[:, top : top + 32, left : left + 32]
                height, width = part.shape[1:]
                window[:, :height, :width] = part
                logits = plain_logits(model, window)[:, :height, :width]
                total[:, top : top + 32, left : left + 32] += logits
                count[top : top + 32, left : left + 32] += 1
        expected = (total / count).softmax(0)
        test = TestConfig(mode="slide", window=(32, 32), stride=(24, 24), window_border="pad")
        actual = predict_probabilities(model, image, test)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_a_window_larger_than_the_picture_is_padded(model: danet.DANet, image: Tensor) -> None:
    test = TestConfig(mode="slide", window=(96, 64), stride=(64, 64), window_border="pad")
    padded = torch.zeros(3, 64, 96, dtype=torch.uint8)
    padded[:, :50, :70] = image
    with torch.inference_mode():
        expected = plain_logits(model, padded)[:, :50, :70].softmax(0)
        actual = predict_probabilities(model, image, test)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_ratios_of_the_scale_or_of_the_image() -> None:
    def sizes(**options: object) -> list[tuple[int, int]]:
        test = TestConfig(scale=(140, 200), ratios=(0.5, 1.5), **options)
        return view_sizes(70, 50, test)

    assert sizes() == [(98, 70), (294, 210)]
    assert sizes(ratios_of="image") == [(35, 25), (105, 75)]
