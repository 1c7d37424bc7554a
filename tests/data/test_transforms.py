import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from augmentation import as_tensors, scaled_then_cropped
from danet.config import DataConfig
from danet.data import transforms
from danet.data.resize import Box
from danet.data.transforms import (
    PhotometricDistortion,
    RandomGamma,
    RandomNoise,
    RandomScaledCrop,
    RandomWhiteBalance,
    degradation,
    fitted_size,
    paste_classes,
    training_transform,
)


def pair(height: int = 30, width: int = 40) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return as_tensors(image, random.integers(0, 3, (height, width), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "bounds", "factor", "expected"),
    [
        ((2048, 1024), (2048, 1024), 1.0, (2048, 1024)),
        ((2048, 1024), (2048, 1024), 0.5, (1024, 512)),
        # mmcv.rescale_size((500, 375), (2048, 512)): min(2048 / 500, 512 / 375) = 1.36533
        ((500, 375), (2048, 512), 1.0, (683, 512)),
        ((375, 500), (2048, 512), 1.0, (512, 683)),
        ((500, 375), (2048, 512), 0.7, (477, 358)),
        ((10, 1), (5, 5), 0.1, (1, 1)),
    ],
)
def test_fitted_size(size, bounds, factor: float, expected) -> None:
    assert fitted_size(size, bounds, factor) == expected


def test_scale_is_uniform_in_its_range() -> None:
    torch.manual_seed(0)
    transform = RandomScaledCrop(None, (0.5, 2.0), (10, 10), 1)
    widths = [transform.make_params(pair(20, 100))["scaled"][1] for _ in range(300)]
    assert 50 <= min(widths) < 60
    assert 190 < max(widths) <= 200
    assert np.mean(widths) == pytest.approx(125, abs=8)


def test_labels_are_scaled_by_the_nearest_id() -> None:
    image, label = pair()
    two_ids = tv_tensors.Mask(label.bool() * 200)
    _, scaled = RandomScaledCrop(None, (1.7, 1.7), (100, 100), 1)(image, two_ids)
    assert scaled.shape == (51, 68)
    assert set(scaled.unique().tolist()) == {0, 200}


def test_image_and_label_are_cropped_and_flipped_alike() -> None:
    """The image carries the label's ids, so any disagreement shows."""
    torch.manual_seed(1)
    ids = np.arange(200, dtype=np.uint8).reshape(10, 20) % 200
    image = Image.fromarray(np.repeat(ids[..., None], 3, 2))
    config = DataConfig(
        crop_size=(8, 6),
        scale_range=(1, 1),
        class_cap=1,
        photometric_distortion=False,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    transform = training_transform(config)
    mirrored = 0
    for _ in range(20):
        pixels, label = transform(*as_tensors(image, ids))
        assert label.shape == (6, 8)
        torch.testing.assert_close(pixels[0].as_subclass(Tensor), label.float().as_subclass(Tensor))
        mirrored += bool(label[0, 0] > label[0, 1])
    assert 3 < mirrored < 17


class TestClassCap:
    def crops(self, label: Tensor, cap: float, draws: int = 60) -> list[Tensor]:
        torch.manual_seed(0)
        crop = RandomScaledCrop(None, (1, 1), (10, 10), cap)
        return [crop(tv_tensors.Mask(label)).as_subclass(Tensor) for _ in range(draws)]

    def test_avoids_crops_that_one_class_fills(self) -> None:
        label = torch.zeros(10, 60, dtype=torch.uint8)
        label[:, 25:] = 1
        mixed = [(part == 0).float().mean() for part in self.crops(label, 0.75)]
        capped = np.mean([0.25 < share < 0.75 for share in mixed])
        free = np.mean([0.25 < (part == 0).float().mean() < 0.75 for part in self.crops(label, 1)])
        assert capped > 2 * free

    def test_gives_up_after_ten_more_draws(self, monkeypatch: pytest.MonkeyPatch) -> None:
        draws = 0
        draw = RandomScaledCrop._draw_box

        def counting(self: RandomScaledCrop, scaled: tuple[int, int]) -> Box:
            nonlocal draws
            draws += 1
            return draw(self, scaled)

        monkeypatch.setattr(RandomScaledCrop, "_draw_box", counting)
        self.crops(torch.zeros(20, 20, dtype=torch.uint8), 0.75, draws=1)
        assert draws == transforms.CROP_TRIES + 1

    def test_ignored_pixels_do_not_count(self) -> None:
        label = torch.full((10, 10), 255, dtype=torch.uint8)
        label[0, :2], label[0, 2:5] = 0, 1
        assert transforms._is_varied(label, 0.75)
        label[0, 2:9] = 1
        assert not transforms._is_varied(label, 0.75)


@pytest.mark.parametrize("base_size", [None, (120, 90)])
@pytest.mark.parametrize("class_cap", [0.6, 1.0])
def test_scaled_crop_is_scale_then_crop(
    base_size: tuple[int, int] | None, class_cap: float
) -> None:
    """With the same draws, also of the tries that the class cap refuses."""
    image, label = pair(60, 80)
    label[:, 20:] = 2
    arguments = (base_size, (0.5, 2.0), (50, 40), class_cap)
    for seed in range(30):
        torch.manual_seed(seed)
        expected_image, expected_label = scaled_then_cropped(image, label, *arguments)
        following = torch.rand(())
        torch.manual_seed(seed)
        made_image, made_label = RandomScaledCrop(*arguments)(image, label)
        assert torch.equal(torch.rand(()), following)
        assert torch.equal(made_label, expected_label)
        # torch's 8-bit resize rounds twice, after the columns and after the rows.
        assert (made_image.int() - expected_image.int()).abs().max() <= 1


class TestPasteClasses:
    def test_half_of_the_classes_with_their_pixels(self) -> None:
        torch.manual_seed(0)
        image, other_image = torch.rand(3, 20, 30), torch.rand(3, 20, 30)
        label = torch.full((20, 30), 9, dtype=torch.uint8)
        other_label = torch.randint(5, (20, 30), dtype=torch.uint8)
        other_label[:3] = 255
        drawn = set()
        for _ in range(20):
            mixed_image, mixed_label = paste_classes(image, label, other_image, other_label)
            pasted = set(mixed_label.unique().tolist()) - {9}
            drawn |= pasted
            assert len(pasted) == 2
            assert 255 not in pasted
            for y in range(20):
                for x in range(30):
                    taken = int(other_label[y, x]) in pasted
                    source = (other_image, other_label) if taken else (image, label)
                    assert torch.equal(mixed_image[:, y, x], source[0][:, y, x])
                    assert mixed_label[y, x] == source[1][y, x]
        assert drawn == {0, 1, 2, 3, 4}

    @pytest.mark.parametrize("value", [255, 4])
    def test_nothing_is_pasted_of_a_crop_with_less_than_two_classes(self, value: int) -> None:
        image, label = torch.rand(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8)
        other = torch.full((4, 4), value, dtype=torch.uint8)
        mixed_image, mixed_label = paste_classes(image, label, torch.rand(3, 4, 4), other)
        assert torch.equal(mixed_image, image)
        assert torch.equal(mixed_label, label)


class TestDegradation:
    def test_none_without_a_probability(self) -> None:
        image, label = pair()
        assert torch.equal(degradation(0.0)(image, label)[0], image)

    def test_changes_images_and_never_labels(self) -> None:
        torch.manual_seed(0)
        image, label = pair()
        changed, kept = degradation(1.0)(image, label)
        assert torch.equal(kept, label)
        assert torch.equal(changed[0], changed[1])  # grey
        assert changed.dtype == torch.uint8
        assert changed.float().std() < image.float().std()  # blurred

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 40), (30, 3), (4, 4)])
    def test_small_pictures_pass_and_draw_as_many_numbers(self, height: int, width: int) -> None:
        torch.manual_seed(0)
        degradation(1.0)(*pair())
        expected = torch.rand(())
        torch.manual_seed(0)
        changed, _ = degradation(1.0)(*pair(height, width))
        assert changed.shape == (3, height, width)
        assert torch.equal(torch.rand(()), expected)

    def test_white_balance_is_a_factor_for_each_colour(self) -> None:
        image, label = pair()
        torch.manual_seed(3)
        balanced, kept = RandomWhiteBalance()(image, label)
        torch.manual_seed(3)
        for color, changed, draw in zip(image, balanced, torch.rand(3).tolist(), strict=True):
            gain = math.exp((2 * draw - 1) * math.log(4 / 3))
            expected = (color.numpy() * gain).round().clip(0, 255)
            assert abs(changed.numpy() - expected).max() <= 1  # where rounding is a tie
            assert 0.75 <= gain <= 4 / 3
        assert torch.equal(kept, label)

    def test_gamma_is_the_power_of_the_share_of_white(self) -> None:
        image, _ = pair()
        torch.manual_seed(3)
        bright = RandomGamma()(image)
        torch.manual_seed(3)
        power = 2 ** (2 * torch.rand(()).item() - 1)
        expected = 255 * (image.numpy() / 255.0) ** power
        assert np.abs(bright.numpy() - expected).max() <= 1


class TestNoise:
    grey = tv_tensors.Image(torch.full((3, 200, 300), 128, dtype=torch.uint8))

    def noisy(self, deviation: float, grain: float) -> Tensor:
        torch.manual_seed(0)
        changed = RandomNoise().transform(self.grey, {"deviation": deviation, "grain": grain})
        assert changed.dtype == torch.uint8
        return changed.as_subclass(Tensor).double() - 128

    @staticmethod
    def of_neighbours(difference: Tensor) -> float:
        """Their correlation."""
        both = torch.stack([difference[..., 1:], difference[..., :-1]])
        return torch.corrcoef(both.flatten(1))[0, 1].item()

    def test_has_its_deviation_and_no_mean(self) -> None:
        difference = self.noisy(deviation=12.0, grain=1.0)
        assert abs(difference.std() - 12) < 0.1
        assert abs(difference.mean()) < 0.1
        assert abs(self.of_neighbours(difference)) < 0.02
        colors = torch.corrcoef(difference.flatten(1))
        assert abs(colors[0, 1]) < 0.02

    def test_coarse_grain_makes_neighbours_alike(self) -> None:
        difference = self.noisy(deviation=12.0, grain=2.5)
        assert self.of_neighbours(difference) > 0.5

    def test_labels_stay_and_a_recipe_draws_it(self) -> None:
        image, label = pair()
        changed, kept = RandomNoise()(image, label)
        assert torch.equal(kept, label)
        assert not torch.equal(changed, image)
        plain = {"scale_range": (1.0, 1.0), "photometric_distortion": False, "flip": 0.0}
        config = DataConfig(crop_size=(40, 30), **plain)
        for noise, changes in ((0.0, False), (1.0, True)):
            torch.manual_seed(0)
            with_noise = training_transform(config.model_copy(update={"noise": noise}))(*pair())
            torch.manual_seed(0)
            without = training_transform(config)(*pair())
            assert torch.equal(with_noise[1], without[1])
            assert torch.equal(with_noise[0], without[0]) is not changes


def test_small_pictures_are_padded_after_normalising() -> None:
    config = DataConfig(crop_size=(50, 40), scale_range=(0.5, 0.5))
    image, label = training_transform(config)(*pair())
    assert image.shape == (3, 40, 50)
    assert label.shape == (40, 50)
    assert (image[:, 15:] == 0).all()
    assert (image[:, :, 20:] == 0).all()
    assert (label[15:] == 255).all()
    assert (label[:15, :20] != 255).all()


class TestPhotometricDistortion:
    def distorted(self, image: tv_tensors.Image, **params: object) -> Tensor:
        unchanged = dict.fromkeys(("brightness", "contrast", "saturation", "hue"))
        transform = PhotometricDistortion()
        values = {**unchanged, "contrast_first": True, **params}
        return transform.transform(image, values).as_subclass(Tensor)

    def test_brightness_and_contrast_by_hand(self) -> None:
        image = tv_tensors.Image(torch.tensor([0, 100, 250], dtype=torch.uint8).view(3, 1, 1))
        assert self.distorted(image, brightness=10.0).flatten().tolist() == [10, 110, 255]
        assert self.distorted(image, contrast=0.5).flatten().tolist() == [0, 50, 125]

    @settings(max_examples=60, deadline=None)
    @given(st.tuples(*[st.integers(0, 255)] * 3), st.floats(0.5, 1.5))
    def test_saturation_is_hsvs(self, color: tuple[int, int, int], factor: float) -> None:
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
        expected = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
        image = tv_tensors.Image(torch.tensor(color, dtype=torch.uint8).view(3, 1, 1))
        actual = self.distorted(image, saturation=factor).flatten() / 255
        np.testing.assert_allclose(actual, expected, atol=1.1 / 255)

    @pytest.mark.parametrize("turn", [-0.1, -0.031, 0.0, 0.057, 0.1])
    def test_hue_on_the_borders_of_the_sixths(self, turn: float) -> None:
        """Where two channels are equal, or all three."""
        levels = (0, 3, 100, 255)
        for color in [(a, b, c) for a in levels for b in levels for c in levels]:
            hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
            expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            image = tv_tensors.Image(torch.tensor(color, dtype=torch.uint8).view(3, 1, 1))
            actual = self.distorted(image, hue=turn).flatten() / 255
            np.testing.assert_allclose(actual, expected, atol=1.1 / 255, err_msg=str(color))

    @settings(max_examples=60, deadline=None)
    @given(st.tuples(*[st.integers(0, 255)] * 3), st.floats(-0.1, 0.1))
    def test_hue_is_hsvs(self, color: tuple[int, int, int], turn: float) -> None:
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        image = tv_tensors.Image(torch.tensor(color, dtype=torch.uint8).view(3, 1, 1))
        actual = self.distorted(image, hue=turn).flatten() / 255
        np.testing.assert_allclose(actual, expected, atol=2.1 / 255)

    def test_each_change_happens_half_the_time_within_its_range(self) -> None:
        torch.manual_seed(0)
        draws = [PhotometricDistortion().make_params([]) for _ in range(600)]
        for key, low, high in (
            ("brightness", -32, 32),
            ("contrast", 0.5, 1.5),
            ("saturation", 0.5, 1.5),
            ("hue", -0.1, 0.1),
        ):
            values = [draw[key] for draw in draws if draw[key] is not None]
            assert 0.42 < len(values) / len(draws) < 0.58
            assert low <= min(values) < low + 0.1 * (high - low)
            assert high >= max(values) > high - 0.1 * (high - low)

    def test_labels_are_left_alone(self) -> None:
        torch.manual_seed(0)
        _, label = pair()
        assert PhotometricDistortion()(label) is label


@pytest.mark.parametrize("on", range(4))
def test_each_distortion_is_drawn_by_itself(on: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("brightness", "contrast", "saturation", "hue")
    draws = torch.full((9,), 0.9)
    draws[2 * on] = 0.1
    monkeypatch.setattr(torch, "rand", lambda _: draws)
    params = PhotometricDistortion().make_params([])
    assert [name for name in names if params[name] is not None] == [names[on]]


def test_brightness_is_whole_levels_downwards() -> None:
    others = dict.fromkeys(("contrast", "saturation", "hue"))
    params = {"brightness": -0.5, "contrast_first": True, **others}
    image = tv_tensors.Image(torch.full((3, 2, 2), 10, dtype=torch.uint8))
    assert PhotometricDistortion().transform(image, params).unique().tolist() == [9]


def test_the_cap_itself_is_too_much() -> None:
    label = torch.tensor([[0, 0, 1, 2]], dtype=torch.uint8)
    assert not transforms._is_varied(label, 0.5)
    assert transforms._is_varied(label, 0.51)


def test_white_stays_white_in_warm_light() -> None:
    white = tv_tensors.Image(torch.full((3, 2, 2), 255, dtype=torch.uint8))
    gains = torch.full((3, 1, 1), 4 / 3)
    assert RandomWhiteBalance().transform(white, {"gains": gains}).unique().tolist() == [255]


@pytest.mark.parametrize("level", [0, 255])
def test_noise_ends_at_black_and_white(level: int) -> None:
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.full((3, 40, 40), level, dtype=torch.uint8))
    found = RandomNoise().transform(image, {"deviation": 16.0, "grain": 1.0})
    assert (found.int() - level).abs().max() < 128
