import pytest
import torch

from danet.config import TestConfig
from danet.errors import UserError
from danet.interop import mmseg
from danet.interop.foreign import literal_config
from danet.recipes import load_recipe

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


BACKBONE = "model = dict(backbone=dict(type='ResNetV1c', depth=101, {}))"
STRIDE_8 = "strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)"
STRIDE_16 = "strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)"


@pytest.mark.parametrize(
    ("backbone", "output_stride", "multi_grid"),
    [  # tests/parity/test_network.py has mmsegmentation's own networks compute the same
        ("", 32, None),
        ("contract_dilation=True", 32, None),
        ("multi_grid=(1, 2, 4)", 32, (1, 2, 4)),
        (STRIDE_16 + ", contract_dilation=True, multi_grid=None", 16, None),
        (STRIDE_16, 16, (2, 2, 2)),
        (STRIDE_16 + ", contract_dilation=False, multi_grid=(1, 2, 4)", 16, (1, 2, 4)),
        (STRIDE_8 + ", contract_dilation=True, style='pytorch'", 8, None),
        (STRIDE_8 + ", contract_dilation=True, multi_grid=(4, 8, 16)", 8, (4, 8, 16)),
        ("strides=(1, 2, 1, 1), dilations=(1, 1, 2, 6), contract_dilation=True", 8, (3, 6, 6)),
        (STRIDE_8 + ", contract_dilation=True, conv_cfg=None, norm_cfg=dict(eps=1e-5)", 8, None),
    ],
)
def test_the_backbone_is_dilated_as_the_config_says(
    backbone: str, output_stride: int, multi_grid: tuple[int, ...] | None
) -> None:
    translated = mmseg.translate(state(), {"meta": {"config": BACKBONE.format(backbone)}})
    assert (translated.output_stride, translated.multi_grid) == (output_stride, multi_grid)


@pytest.mark.parametrize("config", ["", "model = dict(decode_head=dict())", "model = get()"])
def test_without_a_word_on_the_backbone_it_is_the_published_one(config: str) -> None:
    translated = mmseg.translate(state(), {"meta": {"config": config}})
    assert (translated.output_stride, translated.multi_grid) == (8, None)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("style='caffe'", "style is not 'pytorch'"),
        (STRIDE_16 + ", style='caffe', multi_grid=(1, 2, 4)", "style is not 'pytorch'"),
        (STRIDE_8, "contract_dilation is not True"),
        (STRIDE_8 + ", contract_dilation=False", "contract_dilation is not True"),
        (STRIDE_8 + ", multi_grid=(4, 8, 16)", "contract_dilation is not True"),
        ("strides=(1, 2, 1, 2)", "strides is (1, 2, 1, 2), not one of those that can be converted"),
        ("strides=(1, 1, 1, 1)", "strides is (1, 1, 1, 1), not one of those that can be converted"),
        ("strides=(1, 2, 2)", "strides must be 4 whole numbers of 1 to 64"),
        ("strides=(True, 2, 1, 1)", "strides must be 4 whole numbers of 1 to 64"),
        ("strides=get()", "strides must be 4 whole numbers"),
        ("strides=(1, 2, 2, 0x" + "f" * 5000 + ")", "strides must be 4 whole numbers"),
        ("dilations=(1, 1, 2, 4)", "dilations is (1, 1, 2, 4); with strides (1, 2, 2, 2) only"),
        ("strides=(1, 2, 1, 1)", "dilations is (1, 1, 1, 1); with strides (1, 2, 1, 1) only"),
        ("dilations='1124'", "dilations must be 4 whole numbers"),
        ("multi_grid=(1, 2)", "multi_grid must be 3 whole numbers"),
        ("multi_grid=(1, 2, 65)", "multi_grid must be 3 whole numbers"),
        ("multi_grid=()", "multi_grid must be 3 whole numbers"),
        ("conv_cfg=dict(type='ConvWS')", "conv_cfg is not Conv2d"),
        ("norm_cfg=dict(type='BN', eps=1e-3)", "norm_cfg has an eps other than 1e-05"),
        ("depth=50", "depth is not 101, that of the weights"),
        (
            "type='ResNeXt'",
            "type is not one of those that can be converted: ResNet, ResNetV1c, ResNetV1d",
        ),
        ("type=['ResNet']", "type is not one of those that can be converted"),
        ("type='ResNet'", "deep_stem is False (ResNet), but True in the weights"),
        ("type='mmseg.ResNetV1d'", "avg_down is True (ResNetV1d), but False in the weights"),
    ],
)
def test_a_backbone_that_cannot_be_built_is_refused(backbone: str, message: str) -> None:
    config = f"model = dict(backbone=dict({backbone}))"
    with pytest.raises(UserError) as caught:
        mmseg.translate(state(), {"meta": {"cfg": config}})
    assert f"checkpoint: its config's model.backbone.{message}" in str(caught.value)


@pytest.mark.parametrize("head", ["decode_head", "auxiliary_head"])
def test_other_batch_norms_in_heads_are_refused(head: str) -> None:
    config = f"model = dict({head}=dict(norm_cfg=dict(type='SyncBN', eps=1e-3)))"
    with pytest.raises(UserError, match=rf"model\.{head}\.norm_cfg has an eps other than 1e-05"):
        mmseg.translate(state(), {"meta": {"cfg": config}})


@pytest.mark.parametrize(
    ("step", "stretches"),
    [
        ("scale=(2048, 512)", True),
        ("scale=(2048, 512), keep_ratio=False", True),
        ("scale=(2048, 512), keep_ratio=True", False),
        ("img_scale=(2048, 512)", False),
        ("img_scale=(2048, 512), keep_ratio=False", True),
    ],
)
def test_pictures_that_were_stretched_are_noted(step: str, stretches: bool) -> None:
    config = f"test_pipeline = [dict(type='Resize', {step})]"
    notes = mmseg.translate(state(), {"meta": {"cfg": config}}).notes
    assert [note.startswith("its test pipeline stretches pictures") for note in notes] == (
        [True] if stretches else []
    )


def test_a_backbone_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.backbone cannot be read"):
        mmseg.translate(state(), {"meta": {"cfg": "model = dict(backbone=get())"}})


@pytest.mark.parametrize("deep_stem", [False, True])
def test_the_stem_of_a_plain_resnet_is_a_key_of_its_own(deep_stem: bool) -> None:
    weights = state()
    if not deep_stem:
        weights["backbone.conv1.weight"] = weights.pop("backbone.stem.0.weight")
    contents = [
        {"meta": {"cfg": f"model = dict(backbone=dict(type='ResNet', deep_stem={stem}))"}}
        for stem in (deep_stem, not deep_stem)
    ]
    assert mmseg.translate(weights, contents[0]).output_stride == 32
    with pytest.raises(UserError, match=f"deep_stem is {not deep_stem}"):
        mmseg.translate(weights, contents[1])


ONE_X_COLORS = "model = dict(data_preprocessor=dict({}))"
ZERO_X_COLORS = "img_norm_cfg = dict(mean=[1, 2, 3], std=[4, 5, 6], to_rgb={})"
STEP = "\ntest_pipeline = [dict(type='MultiScaleFlipAug', transforms=[dict(type='Normalize', {})])]"


@pytest.mark.parametrize(
    ("config", "mean"),
    [
        (ONE_X_COLORS.format("mean=[1, 2, 3], std=[4, 5, 6], bgr_to_rgb=True"), (1, 2, 3)),
        (ONE_X_COLORS.format("mean=[1, 2, 3], std=[4, 5, 6], rgb_to_bgr=True"), (1, 2, 3)),
        (ONE_X_COLORS.format("bgr_to_rgb=True"), (0, 0, 0)),
        (ONE_X_COLORS.format("mean=None, std=None, bgr_to_rgb=True"), (0, 0, 0)),
        ("data_preprocessor = dict(mean=[1, 2, 3], bgr_to_rgb=True)", (1, 2, 3)),
        (ZERO_X_COLORS.format(True), (1, 2, 3)),
        (ZERO_X_COLORS.format(True) + STEP.format("**img_norm_cfg"), (1, 2, 3)),
        (ZERO_X_COLORS.format(False) + STEP.format("mean=[7, 8, 9], to_rgb=True"), (7, 8, 9)),
        ("img_norm_cfg = dict(mean=[1, 2, 3], std=[4, 5, 6])", (1, 2, 3)),
        ("", None),
    ],
)
def test_colours_are_normalized_as_the_config_says(config: str, mean: tuple[int, ...]) -> None:
    assert mmseg.translate(state(), {"meta": {"config": config}}).mean == mean


@pytest.mark.parametrize(
    "config",
    [
        ONE_X_COLORS.format("mean=[1, 2, 3], std=[4, 5, 6], bgr_to_rgb=False"),
        ONE_X_COLORS.format("mean=[1, 2, 3], std=[4, 5, 6]"),
        ZERO_X_COLORS.format(False),
        ZERO_X_COLORS.format(True) + STEP.format("mean=[1, 2, 3], std=[4, 5, 6], to_rgb=False"),
        STEP.format("mean=[1, 2, 3], std=[4, 5, 6], to_rgb=False"),
    ],
)
def test_pictures_that_stay_bgr_are_refused(config: str) -> None:
    with pytest.raises(UserError, match=r"its config leaves pictures BGR \(.*to_rgb is not True\)"):
        mmseg.translate(state(), {"meta": {"config": config}})


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
        "a = dict(b=[1, dict(c=-2)], d=open('x'))\ne = {'f': (1, 'g')}\nh.i = 3\nj = dict(a, k=4)"
    )
    assert config == {"a": {"b": [1, {"c": -2}], "d": None}, "e": {"f": [1, "g"]}, "j": None}
