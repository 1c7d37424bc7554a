"""The optimizers of recipes."""

import torch
from timm.optim.muon import Muon

from danet.config import TrainConfig
from danet.model import DANet


def build_optimizer(model: DANet, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over two groups, backbone and heads.

    Each group's `lr_factor` is what the schedule's learning rate is multiplied by.
    """
    backbone = list(model.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    heads = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {"params": backbone, "lr_factor": 1.0},
        {"params": heads, "lr_factor": config.head_lr_factor},
    ]
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "muon":
        return Muon(groups, lr=lr, weight_decay=decay, momentum=config.momentum)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=True)
    return torch.optim.SGD(groups, lr=lr, weight_decay=decay, momentum=config.momentum, fused=True)
