"""The network on one page: backbone, dual attention head, auxiliary head.

Shapes: B batch, K classes, H W the image, h w = ceil(H / output stride), ceil(W / output stride).
"""

import operator
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from danet.attention import Affinity
from danet.backbone import Backbone
from danet.config import ModelConfig
from danet.errors import UserError
from danet.heads import Branch, DualAttentionHead, FCNHead
from danet.model_card import PICTURE_FILE, write_model_card
from danet.model_folder import (
    MAX_CLASSES,
    Metadata,
    locate,
    misfits,
    read_folder,
    upload,
    write_folder,
)
from danet.validation_errors import validation_message


class DANetOutput(NamedTuple):
    """Logits B K h w at the feature stride; None for a part that is switched off.

    The auxiliary logits have c3's own stride: the same but where output_stride is 32, which c3 of a
    dilated backbone reaches half of.
    """

    fused: Tensor
    position: Tensor | None
    channel: Tensor | None
    auxiliary: Tensor | None


class DANet(nn.Module):
    """Dual attention network (arXiv 1809.02983, figure 2) on any timm backbone.

    Args:
        num_classes: K.
        backbone: a timm model name; `resnet50c` and `resnet101c` are mmsegmentation's ResNetV1c.
        pretrained_backbone: load timm's ImageNet weights from the hub.
        output_stride: of the features that attention works on: 8, 16 or 32.
        head_channels: width of both attention branches.
        key_channels: width of position attention's query and key.
        channel_affinity: see `danet.functional.channel_attention`.
        multi_grid: absolute dilations of the last ResNet stage's blocks, such as (4, 8, 16).
        auxiliary: the FCN head on c3.
        align_corners: of every upsampling of logits.
        position: the position attention branch.
        channel: the channel attention branch; without both it is the plain dilated FCN.
        backbone_weights: a file to read the backbone's weights from instead of the hub.
        metadata: what prediction needs to know; placeholder classes and ImageNet's mean where None.

    Raises:
        UserError: an argument is out of range, the backbone unknown, or its weights out of reach.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50c",
        *,
        pretrained_backbone: bool = True,
        output_stride: int = 8,
        head_channels: int = 512,
        key_channels: int = 64,
        channel_affinity: Affinity = "reference",
        multi_grid: Sequence[int] | None = None,
        auxiliary: bool = True,
        align_corners: bool = False,
        position: bool = True,
        channel: bool = True,
        backbone_weights: str | Path | None = None,
        metadata: Metadata | None = None,
    ) -> None:
        super().__init__()
        num_classes = _checked_num_classes(num_classes)
        try:
            config = ModelConfig(
                backbone=backbone,
                pretrained_backbone=pretrained_backbone,
                backbone_weights=cast(Any, backbone_weights),
                output_stride=output_stride,
                head_channels=head_channels,
                key_channels=key_channels,
                channel_affinity=channel_affinity,
                multi_grid=cast(Any, multi_grid),
                auxiliary=auxiliary,
                align_corners=align_corners,
                position=position,
                channel=channel,
            )
        except ValidationError as error:
            raise UserError(validation_message(error, ModelConfig)) from error
        if not isinstance(metadata, Metadata | None):
            raise UserError(f"metadata is {metadata!r}; it must be a danet.model_folder.Metadata")
        self.config = config.without_backbone_weights()  # by which the network is built again
        self.metadata = Metadata.placeholder(num_classes) if metadata is None else metadata
        self.optimized = False
        """Changed for inference by `danet.optimize`, which cannot be undone."""
        if len(self.metadata.classes) != num_classes:
            raise UserError(
                f"num_classes is {num_classes}, but the metadata names "
                f"{len(self.metadata.classes)} classes"
            )
        self.backbone = Backbone(
            config.backbone,
            pretrained=config.pretrained_backbone,
            output_stride=config.output_stride,
            multi_grid=config.multi_grid,
            weights=config.backbone_weights,
        )
        self.head = DualAttentionHead(
            self.backbone.c4_channels,
            num_classes,
            channels=config.head_channels,
            key_channels=config.key_channels,
            affinity=config.channel_affinity,
            position=config.position,
            channel=config.channel,
        )
        self.auxiliary_head = (
            FCNHead(self.backbone.c3_channels, num_classes) if config.auxiliary else None
        )

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The classifiers it has, in the order of `DANetOutput`: "fused", always, comes first."""
        switched: dict[Branch, bool] = {
            "position": self.config.position,
            "channel": self.config.channel,
        }
        return ("fused", *(branch for branch, on in switched.items() if on))

    def forward(self, images: Tensor) -> DANetOutput:
        """Normalised RGB B 3 H W -> all logits at the feature stride."""
        c3, c4 = self.backbone(images)
        logits = self.head(c4)
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(c3)
        return DANetOutput(logits.fused, logits.position, logits.channel, auxiliary)

    def predict_logits(self, images: Tensor) -> Tensor:
        """Normalised RGB B 3 H W -> fused logits B K H W at the input's size."""
        return self.upsample(self.fused_logits(images), images.shape[-2:])

    def fused_logits(self, images: Tensor) -> Tensor:
        """Normalised RGB B 3 H W -> fused logits B K h w, without what only training needs."""
        return self.head.fused_logits(self.backbone(images).c4)

    def upsample(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """B K h w -> B K H W, bilinear with this network's align_corners."""
        return F.interpolate(
            logits, size=tuple(size), mode="bilinear", align_corners=self.config.align_corners
        )

    def compile_parts(self) -> None:
        """Compiles backbone and branches, each at its first use, in place."""
        for part in (self.backbone, self.head.position_branch, self.head.channel_branch):
            if part is not None:
                part.compile()

    @classmethod
    def from_config(cls, config: ModelConfig, metadata: Metadata) -> Self:
        """Builds what a recipe or a model folder describes; `init_from` is left to training."""
        arguments = config.model_dump(exclude={"init_from"})
        return cls(len(metadata.classes), metadata=metadata, **arguments)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, revision: str | None = None) -> Self:
        """Reads a model folder, a run folder's model or one from the hub, in evaluation mode.

        Raises:
            UserError: no model there, or its files are damaged or do not belong together.
        """
        folder = locate(folder_or_hub_id, revision)
        stored, state = read_folder(folder)
        # A folder's config must not have other files read.
        config = stored.model.without_backbone_weights()
        # Nor ask for more memory than its weights take: first a network without any.
        with torch.device("meta"):
            wanted = cls.from_config(config, stored.metadata).state_dict()
        if problems := misfits(state, wanted):
            raise UserError(
                f"{folder}: the weights do not fit its config ({len(problems)} tensors, first: "
                f"{problems[0]})"
            )
        model = cls.from_config(config, stored.metadata)
        model.load_state_dict(state)
        return model.eval()

    def require_original(self, verb: str) -> None:
        """Raises a UserError, which tells what to do with which network, if it is a Predictor's."""
        if self.optimized:
            raise UserError(
                "the model is a Predictor's network, made for one device and precision; "
                f"{verb} the network or folder that the Predictor was made from"
            )

    def save_pretrained(self, folder: str | Path, *, half: bool = False) -> None:
        """Writes `config.json` and `model.safetensors`, all that prediction needs.

        Args:
            half: store the weights in half precision: half the size.

        Raises:
            UserError: it is a `Predictor`'s network, without the batch norms that a folder holds,
                or its layers are not those of its config and metadata.
        """
        self.require_original("save")
        if folder == "":
            raise UserError("the folder to save in has an empty name")
        state = self.state_dict()
        self._require_described(folder, state)
        write_folder(Path(folder), self.config, self.metadata, state, half=half)

    def _require_described(self, folder: str | Path, state: dict[str, Tensor]) -> None:
        """Raises a UserError unless `from_pretrained` would build this network."""
        with torch.device("meta"):
            described = type(self).from_config(self.config, self.metadata).state_dict()
        if problems := misfits(state, described):
            raise UserError(
                f"{folder}: not saved, because it could not be loaded again: {problems[0]}, by the "
                "network's config and metadata; undo what was changed in its layers (pruning, "
                "wrappers), or for other classes build a DANet with that num_classes and copy the "
                "weights that fit"
            )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | Path | None = None,
        picture: Image.Image | None = None,
        license_id: str | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Uploads the model folder with a card to the hub and returns the commit's address.

        Args:
            repo_id: OWNER/NAME; made if it is not there.
            run: the run folder that the model comes from: its recipe and scores go on the card.
            picture: shown on the card, such as an overlay.
            license_id: as the hub names licences, such as "mit".
        """
        if picture is not None and not isinstance(picture, Image.Image):
            raise UserError(
                f"picture is a {type(picture).__name__}; give a Pillow picture, such as "
                "PIL.Image.open(FILE)"
            )
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder)
            if picture is not None:
                picture.convert("RGB").save(folder / PICTURE_FILE, quality=92)
            source = None if run is None else Path(run)
            write_model_card(
                folder, repo_id, self.config, self.metadata, run=source, license_id=license_id
            )
            return upload(folder, repo_id, private=private, token=token)


def _checked_num_classes(number: Any) -> int:
    """A whole number, of NumPy's too."""
    try:
        checked = 0 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        checked = 0
    if not 1 <= checked <= MAX_CLASSES:
        raise UserError(
            f"num_classes is {number!r}; it must be 1 to {MAX_CLASSES}, because masks are 8 bit"
        )
    return checked
