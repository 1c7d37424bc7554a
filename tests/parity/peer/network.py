"""The peer's head and network: their keys, logits, losses and training."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmseg
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper, PolyLR
from mmengine.structures import PixelData
from mmseg.datasets import CityscapesDataset
from mmseg.models.decode_heads.da_head import DAHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.registry import MODELS
from mmseg.structures import OHEMPixelSampler, SegDataSample
from mmseg.utils import register_all_modules
from safetensors.torch import load_file, save_file


def build_head(args: argparse.Namespace) -> torch.nn.Module:
    """Build the head with plain BatchNorm and no dropout, so that its output is a pure function."""
    head: torch.nn.Module = DAHead(
        in_channels=args.in_channels,
        in_index=0,
        channels=args.channels,
        pam_channels=args.pam_channels,
        num_classes=args.num_classes,
        dropout_ratio=0,
        norm_cfg={"type": "BN"},
        align_corners=False,
    )
    return head


def list_keys(args: argparse.Namespace) -> None:
    """Print the state dict as a JSON object of key to shape, in the head's own order."""
    shapes = {key: list(tensor.shape) for key, tensor in build_head(args).state_dict().items()}
    json.dump(shapes, sys.stdout, indent=2)
    sys.stdout.write("\n")


def run_head(args: argparse.Namespace) -> None:
    """Write the fused, position and channel logits, computed in the dtype of the features."""
    features = load_file(args.features)["c4"]
    head = build_head(args).to(features.dtype)
    head.load_state_dict(load_file(args.weights), strict=True)
    head.train(args.train)
    with torch.no_grad():
        fused, position, channel = head([features])
    logits = {"fused": fused, "position": position, "channel": channel}
    save_file({name: tensor.contiguous() for name, tensor in logits.items()}, args.out)


def build_model(depth: int, backbone: dict[str, Any] | None = None) -> tuple[torch.nn.Module, str]:
    """Build the published network with plain BatchNorm; also give its config's text.

    Args:
        backbone: keys of the config's backbone to change; those that are None are left out.
    """
    configs = Path(mmseg.__file__).parent / ".mim" / "configs" / "_base_" / "models"
    config = Config.fromfile(configs / "danet_r50-d8.py")
    norm = {"type": "BN", "requires_grad": True}
    config.model.pretrained = None
    config.model.backbone.depth = depth
    for key, value in (backbone or {}).items():
        config.model.backbone.pop(key, None)
        if value is not None:
            config.model.backbone[key] = value
    for part in (config.model.backbone, config.model.decode_head, config.model.auxiliary_head):
        part.norm_cfg = norm
    register_all_modules()
    model: torch.nn.Module = MODELS.build(config.model)
    return model, config.pretty_text


def randomize(model: torch.nn.Module) -> None:
    """Move residual weights, scales and batch statistics from their start; spread the logits."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("gamma.scale"):
                tensor.fill_(0.6)
            elif name.endswith("conv_seg.weight"):
                tensor.mul_(20)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.6, 1.6)
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.uniform_(0.5, 1.2)


def run_model(args: argparse.Namespace) -> None:
    """Write a checkpoint as mmengine's runner does, and all four logits of the given images."""
    torch.manual_seed(args.depth)
    model, text = build_model(args.depth, args.backbone)
    randomize(model)
    model.eval()
    dataset = CityscapesDataset.METAINFO
    torch.save(
        {
            "meta": {"dataset_meta": dict(dataset), "cfg": text},
            "message_hub": {"loss": HistoryBuffer([1.0, 0.5], [1, 1])},
            "state_dict": model.state_dict(),
        },
        args.checkpoint,
    )
    with torch.no_grad():
        features = model.backbone(load_file(args.images)["images"])
        fused, position, channel = model.decode_head(features)
        auxiliary = model.auxiliary_head(features)
    logits = {"fused": fused, "position": position, "channel": channel, "auxiliary": auxiliary}
    save_file({name: tensor.contiguous() for name, tensor in logits.items()}, args.out)


def load_model(path: Path, depth: int) -> torch.nn.Module:
    """The published network with a checkpoint's weights."""
    model, _ = build_model(depth)
    model.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    return model.eval()


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """Make training a pure function of weights and batch."""
    model.decode_head.dropout = None
    model.auxiliary_head.dropout = None
    return model


def total_loss(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The training loss as mmseg's model computes it, and its parts."""
    samples = []
    for label in labels:
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=label[None].long())
        samples.append(sample)
    features = model.backbone(images)
    decode = model.decode_head.loss_by_feat(model.decode_head(features), samples)
    auxiliary = model.auxiliary_head.loss_by_feat(model.auxiliary_head(features), samples)
    parts = {name: value for name, value in decode.items() if "loss" in name}
    parts["auxiliary"] = auxiliary["loss_ce"]
    return sum(parts.values()), parts


def run_training(args: argparse.Namespace) -> None:
    """Write the first weights, the first gradients, every step's losses, and the last weights."""
    batches = load_file(args.batches)
    steps = len(batches["images"])
    torch.manual_seed(args.depth)
    model, _ = build_model(args.depth)
    # Its own initialisation: random scales give gradients so large that training is chaotic.
    model.init_weights()
    for attention in (model.decode_head.pam, model.decode_head.cam):
        torch.nn.init.constant_(attention.gamma.scale, 0.6)
    without_dropout(model).train().to(batches["images"].dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    meta = {"CLASSES": CityscapesDataset.METAINFO["classes"]}
    torch.save({"meta": meta, "state_dict": state}, args.checkpoint)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
    # mmengine spreads the decay over end - 1 steps; the published models were trained by mmcv's
    # hook, which spreads it over all of them.
    schedule = PolyLR(
        OptimWrapper(optimizer), power=0.9, eta_min=1e-4, begin=0, end=steps + 1, by_epoch=False
    )
    losses, first_gradients = [], {}
    for images, labels in zip(batches["images"], batches["labels"], strict=True):
        optimizer.zero_grad()
        loss, _ = total_loss(model, images, labels)
        loss.backward()
        if not losses:
            first_gradients = {
                f"gradient/{name}": parameter.grad.clone()
                for name, parameter in model.named_parameters()
            }
        losses.append(loss.detach())
        optimizer.step()
        schedule.step()
    last = {f"last/{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file({"losses": torch.stack(losses), **first_gradients, **last}, args.out)


def run_losses(args: argparse.Namespace) -> None:
    """Write the cross-entropy of given logits, plain, with class weights, on hard examples."""
    tensors = load_file(args.tensors)
    logits, labels = tensors["logits"], tensors["labels"].long()
    class_weight = tensors["class_weights"].tolist()
    loss, weighted = CrossEntropyLoss(), CrossEntropyLoss(class_weight=class_weight)
    losses = {}
    for name, threshold, kept in (("few", 0.02, 10), ("many", 0.3, 3000)):
        sampler = OHEMPixelSampler(SimpleNamespace(ignore_index=255), threshold, kept)
        weight = sampler.sample(logits, labels[:, None])
        losses[f"hard/{name}"] = loss(logits, labels, weight=weight, ignore_index=255)
    losses["plain"] = loss(logits, labels, ignore_index=255)
    # With ignored pixels its class weights are indexed by 255 and fail.
    losses["weighted"] = weighted(logits, labels.where(labels != 255, 0), ignore_index=255)
    save_file(losses, args.out)


def add_commands(commands: Any) -> None:
    """Add this module's subcommands."""
    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument("--num-classes", type=int, default=19)
    sizes.add_argument("--in-channels", type=int, default=2048)
    sizes.add_argument("--channels", type=int, default=512)
    sizes.add_argument("--pam-channels", type=int, default=64)

    keys = commands.add_parser("keys", parents=[sizes], help="list state dict keys and shapes")
    keys.set_defaults(command=list_keys)

    head = commands.add_parser("head", parents=[sizes], help="run the head on given features")
    head.add_argument("--weights", type=Path, required=True, help="state dict, strict, peer's keys")
    head.add_argument("--features", type=Path, required=True, help="one tensor 'c4', [B, C, H, W]")
    head.add_argument("--out", type=Path, required=True, help="gets 'fused', 'position', 'channel'")
    head.add_argument("--train", action="store_true", help="batch statistics in BatchNorm")
    head.set_defaults(command=run_head)

    model = commands.add_parser("model", help="run the whole network on given images")
    model.add_argument("--depth", type=int, choices=[50, 101], default=50)
    model.add_argument("--backbone", type=json.loads, help="changes to the config's backbone")
    model.add_argument("--images", type=Path, required=True, help="one tensor 'images', [B,3,H,W]")
    model.add_argument("--checkpoint", type=Path, required=True, help="gets the weights")
    model.add_argument("--out", type=Path, required=True, help="gets all four logits")
    model.set_defaults(command=run_model)

    losses = commands.add_parser("losses", help="compute losses of given logits")
    losses.add_argument("--tensors", type=Path, required=True, help="logits, labels, class_weights")
    losses.add_argument("--out", type=Path, required=True, help="gets a number for each loss")
    losses.set_defaults(command=run_losses)

    training = commands.add_parser("train", help="train the whole network on given batches")
    training.add_argument("--depth", type=int, choices=[50, 101], default=50)
    training.add_argument("--batches", type=Path, required=True, help="images TB3HW, labels TBHW")
    training.add_argument("--checkpoint", type=Path, required=True, help="gets the first weights")
    training.add_argument("--out", type=Path, required=True, help="gets losses and weights")
    training.set_defaults(command=run_training)
