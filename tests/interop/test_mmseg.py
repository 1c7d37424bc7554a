import pytest
import torch

from danet.config import TestConfig, load_recipe
from danet.interop import mmseg
from danet.interop.foreign import literal_config

CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    decode_head=dict(type='DAHead', align_corners=True, num_classes=19),
    test_cfg=dict(mode='slide', crop_size=(769, 513), stride=(513, 300)))
img_norm_cfg = dict(mean=[1.5, 2, 3], std=[4, 5, 6], to_rgb=True)
data = dict(samples=__import__('os').system('exit 3'))
"""


def state() -> dict[str, torch.Tensor]:
    names = [f"backbone.layer3.{i}.conv1.weight" for i in range(23)]
    names += ["backbone.stem.0.weight", "backbone.layer2.0.downsample.1.weight"]
    return {name: torch.zeros(32, 3, 3, 3) for name in names}


def test_settings_are_read_from_the_configs_text() -> None:
    content = {"meta": {"config": CONFIG, "CLASSES": ("a", "b"), "PALETTE": [[1, 2, 3], [4, 5, 6]]}}
    translated = mmseg.translate(state(), content)
    assert translated.backbone == "resnet101c"
    assert translated.align_corners
    assert translated.test == {"mode": "slide", "window": (513, 769), "stride": (300, 513)}
    assert translated.classes == ("a", "b")
    assert translated.palette == ((1, 2, 3), (4, 5, 6))
    assert translated.mean == (1.5, 2.0, 3.0)


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {},
        {"config": "not python ("},
        {"cfg": 7, "dataset_meta": "x", "CLASSES": 3},
        {"config": "model = dict(test_cfg=dict(mode='slide', crop_size=1))"},
        {"config": "(" * 10_000},
    ],
)
def test_metadata_of_any_shape_is_tolerated(meta: object) -> None:
    translated = mmseg.translate(state(), {"meta": meta})
    assert translated.test == {}
    assert not translated.align_corners
    assert translated.classes is None


ZERO_X = """
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug', img_scale=(2049, 1025), flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='RandomFlip'),
            dict(type='Normalize', mean=[1, 2, 3], std=[1, 1, 1], to_rgb=True),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img'])])]
"""
ONE_X = """
train_pipeline = [dict(type='RandomResize', scale=(3000, 900), ratio_range=(0.5, 2.0))]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', keep_ratio=True, scale=(2048, 512)),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs')]
"""
SLIDE = "model = dict(test_cfg=dict(mode='slide', crop_size=(769, 769), stride=(513, 513)))"
AUGMENTED = "test_pipeline = [dict(type='MultiScaleFlipAug', {})]"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ZERO_X, TestConfig(scale=(2049, 1025))),
        (ONE_X, TestConfig(scale=(2048, 512))),
        (  # what is tested with, where the variable says something else
            ONE_X + "data = dict(test=dict(pipeline=[dict(type='Resize', img_scale=(512, 640))]))",
            TestConfig(scale=(640, 512)),
        ),
        (
            ONE_X + "test_dataloader = dict(dataset=dict(pipeline=[dict(type='Resize', scale=9)]))",
            TestConfig(scale=(9, 9)),
        ),
        (ONE_X + "data = dict(test=dict(pipeline=test_pipeline))", TestConfig(scale=(2048, 512))),
        (
            AUGMENTED.format("img_scale=[(2048, 512)], img_ratios=[0.5, 1.25], flip=True"),
            TestConfig(scale=(2048, 512), ratios=(0.5, 1.25), flip=True),
        ),
        (AUGMENTED.format("img_scale=None, img_ratios=0.5"), TestConfig(ratios=(0.5,))),
        (AUGMENTED.format("img_scale=[(9, 9), (5, 5)], img_ratios=get()"), TestConfig()),
        ("test_pipeline = [7, [dict(type='Resize', scale='x')], dict(transforms=3)]", TestConfig()),
    ],
)
def test_the_test_pipeline_says_how_pictures_are_scaled(config: str, expected: TestConfig) -> None:
    translated = mmseg.translate(state(), {"meta": {"config": config}})
    assert TestConfig.model_validate(translated.test) == expected


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ade20k_r50_512x512_80k", ONE_X),
        ("voc_r101_512x512_20k", ONE_X),
        ("cityscapes_r50_769x769_40k", SLIDE + ZERO_X),
    ],
)
def test_the_published_networks_are_tested_as_the_recipes_test_ours(name: str, config: str) -> None:
    translated = mmseg.translate(state(), {"meta": {"config": config}})
    assert TestConfig.model_validate(translated.test) == load_recipe(name).test


def test_a_palette_that_is_none_is_left_out() -> None:
    for palette in ([[300, 0, 0]], [[float("inf"), 0, 0]], [[0, 0]], [[0, 0, 0]] * 2, 7, "x"):
        meta = {"CLASSES": ["a\ud800"], "PALETTE": palette}
        translated = mmseg.translate(state(), {"meta": meta})
        assert translated.classes == ("a?",)
        assert translated.palette is None


def test_keys_that_are_no_literals_are_left_out() -> None:
    text = "a = {[1]: 2, {}: 3, x: 4, [1][0]: 5, **y, (1, 2): dict(b=6), {3}: 7, 'c': [z]}"
    assert literal_config(text) == {"a": {(1, 2): {"b": 6}, "c": [None]}}


def test_literals_only() -> None:
    config = literal_config(
        "a = dict(b=[1, dict(c=-2)], d=open('x'))\ne = {'f': (1, 'g')}\nh.i = 3"
    )
    assert config == {"a": {"b": [1, {"c": -2}], "d": None}, "e": {"f": [1, "g"]}}
