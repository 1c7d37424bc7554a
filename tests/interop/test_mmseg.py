import pytest
import torch

from danet.config import TestConfig
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
    assert translated.test == TestConfig(mode="slide", window=(513, 769), stride=(300, 513))
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
    assert translated.test == TestConfig()
    assert not translated.align_corners
    assert translated.classes is None


def test_literals_only() -> None:
    config = literal_config(
        "a = dict(b=[1, dict(c=-2)], d=open('x'))\ne = {'f': (1, 'g')}\nh.i = 3"
    )
    assert config == {"a": {"b": [1, {"c": -2}], "d": None}, "e": {"f": [1, "g"]}}
