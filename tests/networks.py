"""The small networks that tests segment with and train."""

from typing import Any

import torch

import danet

TINY_RUN = (
    "model.backbone=test_resnet",
    "model.head_channels=16",
    "model.key_channels=4",
    "data.crop_size=[48, 48]",
    "data.train_images=6",
    "data.workers=0",
    "data.cache=true",
    "train.batch_size=2",
    "train.log_every=1",
    "train.validate_images=1",
    "test.scale=[96, 72]",
)
"""Changes to recipe demo that make a step take milliseconds."""


def tiny_danet(classes: int = 5, **settings: Any) -> danet.DANet:
    """The same random weights at every call, in evaluation mode."""
    torch.manual_seed(1)
    sizes = {"head_channels": 16, "key_channels": 4, **settings}
    return danet.DANet(classes, "test_resnet", pretrained_backbone=False, **sizes).eval()


def attentive_danet(position: bool = True, channel: bool = True) -> danet.DANet:
    """As `tiny_danet`, with attention that has an effect."""
    model = tiny_danet(position=position, channel=channel)
    for name, parameter in model.named_parameters():
        if name.endswith("residual_weight"):
            torch.nn.init.constant_(parameter, 0.5)
    return model
