"""The dual attention head against mmsegmentation's `DAHead` with the same weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from danet.heads import DualAttentionHead

pytestmark = pytest.mark.slow

IN_CHANNELS, CHANNELS, KEY_CHANNELS, NUM_CLASSES = 64, 32, 4, 19

PEER_NAMES = {
    "position_branch.reduce.0": "pam_in_conv.conv",
    "position_branch.reduce.1": "pam_in_conv.bn",
    "position_branch.attention.query": "pam.query_project",
    "position_branch.attention.key": "pam.key_project",
    "position_branch.attention.value": "pam.value_project",
    "position_branch.attention.residual_weight": "pam.gamma.scale",
    "position_branch.refine.0": "pam_out_conv.conv",
    "position_branch.refine.1": "pam_out_conv.bn",
    "position_classifier.1": "pam_conv_seg",
    "channel_branch.reduce.0": "cam_in_conv.conv",
    "channel_branch.reduce.1": "cam_in_conv.bn",
    "channel_branch.attention.residual_weight": "cam.gamma.scale",
    "channel_branch.refine.0": "cam_out_conv.conv",
    "channel_branch.refine.1": "cam_out_conv.bn",
    "channel_classifier.1": "cam_conv_seg",
    "fused_classifier.1": "conv_seg",
}


def peer_weights(head: DualAttentionHead) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in head.state_dict().items():
        ours = next(prefix for prefix in PEER_NAMES if name.startswith(prefix))
        scalar = name.endswith("residual_weight")
        peers = PEER_NAMES[ours] + name.removeprefix(ours)
        weights[peers] = tensor.squeeze() if scalar else tensor
    return weights


def randomized_head(dtype: torch.dtype) -> DualAttentionHead:
    """Residual weights and batch statistics away from their start, where mistakes hide."""
    torch.manual_seed(0)
    head = DualAttentionHead(IN_CHANNELS, NUM_CLASSES, CHANNELS, KEY_CHANNELS).to(dtype)
    with torch.no_grad():
        for name, tensor in head.state_dict().items():
            if name.endswith("residual_weight"):
                tensor.fill_(0.7)
            elif name.endswith(("running_mean", "1.bias")):
                tensor.uniform_(-0.5, 0.5)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
    return head


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_all_three_logits_are_the_peers(
    dtype: torch.dtype,
    tolerance: float,
    training: bool,
    peer: Callable[..., str],
    tmp_path: Path,
) -> None:
    head = randomized_head(dtype).train(training)
    for classifier in (head.fused_classifier, head.position_classifier, head.channel_classifier):
        classifier[0].p = 0.0
    features = torch.randn(2, IN_CHANNELS, 13, 17, dtype=dtype)
    weights_file, features_file, logits_file = (
        tmp_path / f"{name}.safetensors" for name in ("weights", "features", "logits")
    )
    save_file(peer_weights(head), weights_file)
    save_file({"c4": features}, features_file)
    peer(
        "head",
        *("--weights", weights_file, "--features", features_file, "--out", logits_file),
        *("--num-classes", NUM_CLASSES, "--in-channels", IN_CHANNELS),
        *("--channels", CHANNELS, "--pam-channels", KEY_CHANNELS),
        *(["--train"] if training else []),
    )
    peers = load_file(logits_file)
    with torch.no_grad():
        ours = head(features)._asdict()
    for name, logits in ours.items():
        error = (logits - peers[name]).abs().max() / peers[name].abs().max()
        assert error < tolerance, name
