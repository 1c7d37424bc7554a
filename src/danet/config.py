"""The settings of a recipe, validated."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from danet.choices import DeviceName, Precision, TestMode

Size = tuple[Annotated[int, Field(ge=1, le=65_536)], Annotated[int, Field(ge=1, le=65_536)]]
"""Width, height in pixels."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
PUBLISHED_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales of the published multi-scale test."""


class Section(BaseModel):
    """Settings that cannot be changed, misspelt, or infinite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _take_no_yes_for_a_number(cls, value: Any, field: ValidationInfo) -> Any:
        kind = cls.model_fields[str(field.field_name)].annotation
        items = value if isinstance(value, list | tuple) else [value]
        if bool not in (kind, *get_args(kind)) and any(isinstance(item, bool) for item in items):
            raise ValueError("true or false is not a valid value here")
        return value


class ModelConfig(Section):
    """The network, as `danet.DANet` takes it."""

    backbone: str = "resnet50c"
    """A timm model name; resnet50c and resnet101c are mmsegmentation's ResNetV1c."""
    pretrained_backbone: bool = True
    """Start from timm's ImageNet weights, fetched from the hub."""
    backbone_weights: Path | None = None
    """Read the backbone's weights from this file instead of the hub."""
    output_stride: Literal[8, 16, 32] = 8
    """Pixels of the picture, each way, per position that attention works on."""
    head_channels: int = Field(512, ge=1, le=65_536)
    """Width of both attention branches."""
    key_channels: int = Field(64, ge=1, le=65_536)
    """Width of position attention's query and key."""
    channel_affinity: Literal["reference", "paper"] = "reference"
    """Channel attention as every released network has it, or as the paper's equation (3)."""
    position: bool = True
    """The position attention branch."""
    channel: bool = True
    """The channel attention branch."""
    auxiliary: bool = True
    """The auxiliary FCN head on c3, the output of the third stage; used in training only."""
    multi_grid: tuple[Annotated[int, Field(ge=1, le=64)], ...] | None = Field(None, min_length=1)
    """Absolute dilations of the last ResNet stage's blocks, such as [4, 8, 16]; none: one for
    all."""
    align_corners: bool = False
    """Upsample logits with the corners' pixels aligned."""
    init_from: Path | None = None
    """A model folder whose weights training starts from; classifiers only if the classes agree."""

    def without_backbone_weights(self) -> Self:
        """For a network that gets its weights elsewhere: reads no file, and asks no hub."""
        return self.model_copy(update={"pretrained_backbone": False, "backbone_weights": None})


class ExtraData(Section):
    """Pictures of another dataset of the same classes, or the same again to see them more often."""

    name: str
    """A dataset; danet data list names them."""
    root: Path | None = None
    """Its folder; none for generated data, or for the main dataset's own."""
    split: str = "train"
    """The part of it to train on."""
    images: int | None = Field(None, ge=1)
    """Use only the first so many pictures; none: all."""
    repeat: int = Field(1, ge=1, le=1000)
    """Times that each picture is shown in an epoch."""


class DataConfig(Section):
    """Training data and its augmentation. Sizes are width, height in pixels."""

    name: str = "scenes"
    """A dataset; danet data list names them."""
    root: Path | None = None
    """Folder of the dataset in its official layout; none for generated data."""
    train_split: str = "train"
    """The part of the dataset to train on."""
    val_split: str = "val"
    """The part that validations score."""
    train_images: int | None = Field(None, ge=1)
    """Train on the first so many pictures only; none: all."""
    extra: tuple[ExtraData, ...] = ()
    """Shown in every epoch as well, such as [{name: scenes, images: 200}]."""
    cache: bool = False
    """Keep every picture in memory, once in each worker, after it was first read."""
    base_size: Size | None = None
    """Bounds (long side, short side) that a scale of 1 fits a picture into; none: its own size."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """The random scale is uniform between these."""
    crop_size: Size = (512, 512)
    """Size of the random crops; smaller pictures are padded, and the padding is ignored."""
    class_cap: Fraction = 0.75
    """A crop is drawn again, up to 10 times, while one class holds at least this share of its
    labelled pixels, or is the only one; 1 takes every crop."""
    flip: Fraction = 0.5
    """Probability of mirroring left to right."""
    photometric_distortion: bool = True
    """Random brightness, contrast, saturation and hue, as mmsegmentation."""
    degradation: Fraction = 0.0
    """Probability of each of gamma 1/2..2, gains of 3/4..4/3 for each colour, greyscale and blur,
    for light and cameras that the training pictures do not show."""
    noise: Fraction = 0.0
    """Probability of a sensor's noise, of a standard deviation of up to 16 levels."""
    class_mix: Fraction = 0.0
    """Probability of pasting half the classes of another crop, pixel for pixel, over a crop
    (ClassMix, arXiv 2007.07936): for small datasets."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from RGB in 0..255."""
    std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375)
    """What the result is divided by."""
    workers: int = Field(2, ge=0)
    """Processes that read and augment; 0 does it in the training process."""

    @model_validator(mode="after")
    def _ranges(self) -> "DataConfig":
        low, high = self.scale_range
        if not 0 < low <= high <= 16:
            raise ValueError("scale_range must be LOW, HIGH with 0 < LOW <= HIGH <= 16")
        return self


class TrainConfig(Section):
    """The optimisation. A step is one update of the weights."""

    steps: int = Field(40_000, ge=1)
    """Updates of the weights in the whole run."""
    batch_size: int = Field(8, ge=1)
    """Pictures per step over all devices."""
    accumulate: int = Field(1, ge=1)
    """Forward and backward passes that a device splits its share of the batch into."""
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """sgd with momentum, as published; adamw; or muon (timm's: orthogonalised momentum for weight
    tensors and AdamW for the rest), which needs the fewest steps when training from scratch."""
    lr: float = Field(0.01, gt=0)
    """Learning rate at the start; falls to `lr_min` by a power of the share of steps left."""
    lr_min: float = Field(1e-4, ge=0)
    """Learning rate at the end."""
    lr_power: float = Field(0.9, gt=0)
    """Exponent of the share of steps left."""
    warmup_steps: int = Field(0, ge=0)
    """First steps, in which the learning rate rises linearly to that of the schedule."""
    head_lr_factor: float = Field(1.0, gt=0)
    """The heads' learning rate over the backbone's."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd and muon."""
    weight_decay: float = Field(5e-4, ge=0)
    """Of all parameters."""
    branch_loss_weight: float = Field(1.0, ge=0)
    """Weight of the losses of the position and the channel logits; the fused logits' is 1."""
    auxiliary_loss_weight: float = Field(0.4, ge=0)
    """Weight of the loss of the FCN head on c3."""
    loss_divisor: Literal["all", "valid"] = "all"
    """Mean over all pixels, as mmsegmentation, or over labelled pixels only, as the authors."""
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Factors of the loss, one per class in the order of their ids."""
    hard_example_threshold: float | None = Field(None, gt=0, lt=1)
    """Online hard example mining: leave out pixels whose true class has at least this probability;
    none: keep all. The published value is 0.7. Each process and part of `accumulate` chooses among
    its own pixels."""
    hard_example_min_kept: int = Field(100_000, ge=1)
    """Keep at least this many pixels per picture of the batch, the hardest ones."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Average the weights over steps, and keep the average as the model. After s steps the decay is
    1 - s^(-2/3), up to this: 0.998 is reached after 11,000 steps."""
    precision: Precision = "auto"
    """auto: bfloat16 autocast where the device computes in it."""
    activation_checkpointing: bool | Literal["early"] = False
    """Keep only the inputs of the backbone's stem and blocks; recompute the rest in the backward
    pass: same result, less memory, more time. early: not in the last stage, which saves less memory
    and costs less time."""
    compile: bool = False
    """Compile backbone and branches at the first step, which takes minutes. For long runs on a GPU:
    the CPUs measured gained nothing."""
    device: DeviceName = "auto"
    """auto: a GPU where there is one."""
    devices: int = Field(1, ge=1)
    """Processes on this machine, one per device."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the training. ddp: each holds all weights and optimizer state;
    fsdp (FSDP2): each holds a part, for networks that do not fit otherwise."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of initial weights, order of pictures and augmentation."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of metrics."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints; a run that was killed loses no more than these."""
    validate_every: int | None = Field(None, ge=1)
    """Steps between validations; none: only after the last step."""
    validate_images: int | None = Field(None, ge=1)
    """Pictures of the validation split that are scored while training; none: all. After the last
    step all are, unless keep is best: then the same pictures choose the weights each time."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the run's model: the last, or those that validated best."""

    @model_validator(mode="after")
    def _some_class_counts(self) -> "TrainConfig":
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError("class_weights are all 0, so nothing would be learnt; raise some")
        return self

    @model_validator(mode="after")
    def _rate_falls(self) -> "TrainConfig":
        if self.lr_min > self.lr:
            raise ValueError(
                f"lr_min ({self.lr_min:g}) is above lr ({self.lr:g}), so the rate could not fall "
                "to it; set lr_min=0, or lower it"
            )
        return self

    @model_validator(mode="after")
    def _sharded(self) -> "TrainConfig":
        if self.strategy == "fsdp" and (self.optimizer == "muon" or self.ema_decay is not None):
            raise ValueError(
                "strategy fsdp goes with optimizer sgd or adamw and without ema_decay; change "
                "these, or use strategy=ddp"
            )
        return self

    @model_validator(mode="after")
    def _compiled_or_checkpointed(self) -> "TrainConfig":
        if self.compile and self.activation_checkpointing:
            raise ValueError("compile and activation_checkpointing exclude each other; choose one")
        return self


class TestConfig(Section):
    """Inference on whole pictures. Sizes are width, height in pixels."""

    __test__ = False  # pytest would take the class for tests

    mode: TestMode = "whole"
    """The picture at once, or in sliding windows."""
    scale: Size | None = None
    """Bounds (long side, short side) that the picture is fitted into; none: its own size."""
    window: Size = (512, 512)
    """Size of the sliding windows (mode slide)."""
    stride: Size = (341, 341)
    """Steps between sliding windows, right and down."""
    window_border: Literal["shift", "pad"] = "shift"
    """Windows that would cross the border: shifted back to end there, as in mmsegmentation, or
    kept in place and padded with black, as in the authors' code."""
    ratios: tuple[Annotated[float, Field(gt=0, le=16)], ...] = Field((1.0,), min_length=1)
    """Scales to test at, as factors of what `ratios_of` says; the softmax scores are averaged."""
    ratios_of: Literal["scale", "image"] = "scale"
    """What the ratios multiply: the test scale, as in mmsegmentation 0.x and the published scores,
    or the picture's own size, as in 1.x."""
    flip: bool = False
    """Average with the mirrored picture's scores too."""
    batch_size: int = Field(4, ge=1)
    """Sliding windows that go through the network together."""

    @model_validator(mode="after")
    def _windows_cover(self) -> "TestConfig":
        if self.stride[0] > self.window[0] or self.stride[1] > self.window[1]:
            raise ValueError("stride must not exceed window, or pixels between windows are missed")
        return self


class RunConfig(Section):
    """A resolved recipe."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    test: TestConfig = TestConfig()

    def to_yaml(self) -> str:
        document = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return str(document)


def differing_keys(one: RunConfig, other: RunConfig) -> list[str]:
    """The keys that two recipes give other values to, such as `train.lr`."""
    return [
        f"{section}.{key}"
        for section in RunConfig.model_fields
        for key in type(getattr(one, section)).model_fields
        if getattr(getattr(one, section), key) != getattr(getattr(other, section), key)
    ]
