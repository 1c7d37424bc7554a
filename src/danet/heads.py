"""The segmentation heads: dual attention, and the auxiliary FCN head.

Shapes: B batch, C channels, K classes, h w the feature map's height and width.
"""

from typing import Literal, NamedTuple

from torch import Tensor, nn

from danet.attention import Affinity, ChannelAttention, PositionAttention

DROPOUT = 0.1
"""Share of channels dropped before every classifier (authors' code and mmsegmentation)."""
Branch = Literal["fused", "position", "channel"]
"""A classifier of `DualAttentionHead`, by the field of `HeadLogits` that it gives."""


class HeadLogits(NamedTuple):
    """Logits B K h w of each classifier; None for a branch that is switched off."""

    fused: Tensor
    position: Tensor | None
    channel: Tensor | None


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3, same size."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def classifier(channels: int, num_classes: int) -> nn.Sequential:
    """1x1, after dropping whole channels."""
    return nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(channels, num_classes, 1))


class AttentionBranch(nn.Module):
    """3x3 conv-BN-ReLU to `channels`, attention, 3x3 conv-BN-ReLU: B C h w -> B channels h w."""

    def __init__(self, in_channels: int, channels: int, attention: nn.Module) -> None:
        super().__init__()
        self.reduce = conv_bn_relu(in_channels, channels)
        self.attention = attention
        self.refine = conv_bn_relu(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        refined: Tensor = self.refine(self.attention(self.reduce(features)))
        return refined


class DualAttentionHead(nn.Module):
    """Two attention branches on c4 and three classifiers: of their sum, and of each (figure 2).

    With one branch off the sum is the other branch; with both off the head is the paper's plain
    dilated FCN, one 3x3 conv-BN-ReLU before the fused classifier.

    Args:
        in_channels: channels of c4.
        num_classes: K.
        channels: width of both branches.
        key_channels: width of position attention's query and key.
        affinity: of channel attention, see `danet.functional.channel_attention`.
        position, channel: switch the branches for ablation.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 512,
        key_channels: int = 64,
        affinity: Affinity = "reference",
        position: bool = True,
        channel: bool = True,
    ) -> None:
        super().__init__()
        self.position_branch: AttentionBranch | None = None
        self.channel_branch: AttentionBranch | None = None
        self.plain_branch: nn.Sequential | None = None
        self.joint_reduction: nn.Module | None = None
        """Both branches' `reduce` in one layer, where `danet.optimize` joined them."""
        self.position_classifier: nn.Sequential | None = None
        self.channel_classifier: nn.Sequential | None = None
        if position:
            attention = PositionAttention(channels, key_channels)
            self.position_branch = AttentionBranch(in_channels, channels, attention)
            self.position_classifier = classifier(channels, num_classes)
        if channel:
            self.channel_branch = AttentionBranch(in_channels, channels, ChannelAttention(affinity))
            self.channel_classifier = classifier(channels, num_classes)
        if not (position or channel):
            self.plain_branch = conv_bn_relu(in_channels, channels)
        self.fused_classifier = classifier(channels, num_classes)

    def forward(self, features: Tensor) -> HeadLogits:
        """B C h w -> all logits."""
        position, channel, fused = self._branches(features)
        return HeadLogits(
            fused=self.fused_classifier(fused),
            position=_classify(self.position_classifier, position),
            channel=_classify(self.channel_classifier, channel),
        )

    def fused_logits(self, features: Tensor) -> Tensor:
        """B C h w -> B K h w, without the work that only training needs."""
        logits: Tensor = self.fused_classifier(self._branches(features)[2])
        return logits

    def _branches(self, features: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        of_position = of_channel = features
        if self.joint_reduction is not None:
            of_position, of_channel = self.joint_reduction(features)
        position = self.position_branch(of_position) if self.position_branch else None
        channel = self.channel_branch(of_channel) if self.channel_branch else None
        if position is not None and channel is not None:
            return position, channel, position + channel
        if position is not None:
            return position, None, position
        if channel is not None:
            return None, channel, channel
        assert self.plain_branch is not None
        return None, None, self.plain_branch(features)


def _classify(classify: nn.Sequential | None, features: Tensor | None) -> Tensor | None:
    return None if classify is None or features is None else classify(features)


class FCNHead(nn.Module):
    """Auxiliary head on c3, one 3x3 conv-BN-ReLU and a classifier (mmsegmentation's FCNHead).

    Its width is a quarter of c3's channels, as in mmsegmentation: 256 for a ResNet-50's 1024.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        channels = max(in_channels // 4, 1)
        self.reduce = conv_bn_relu(in_channels, channels)
        self.classifier = classifier(channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """B C h w -> B K h w."""
        logits: Tensor = self.classifier(self.reduce(features))
        return logits
