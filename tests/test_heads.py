import pytest
import torch

from danet.heads import DualAttentionHead, FCNHead


def head(**options: object) -> DualAttentionHead:
    torch.manual_seed(0)
    return DualAttentionHead(12, 5, channels=16, key_channels=4, **options)


def test_three_classifiers_give_logits_at_the_features_size() -> None:
    logits = head()(torch.randn(2, 12, 6, 7))
    assert [tuple(part.shape) for part in logits] == [(2, 5, 6, 7)] * 3


def test_the_fused_classifier_sees_the_sum_of_the_branches() -> None:
    network = head().eval()
    features = torch.randn(1, 12, 6, 7)
    position, channel = network.position_branch(features), network.channel_branch(features)
    torch.testing.assert_close(
        network(features).fused, network.fused_classifier(position + channel)
    )
    torch.testing.assert_close(network(features).position, network.position_classifier(position))
    torch.testing.assert_close(network(features).channel, network.channel_classifier(channel))


@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("channel", [True, False])
def test_branches_can_be_switched_off(position: bool, channel: bool) -> None:
    network = head(position=position, channel=channel).eval()
    features = torch.randn(1, 12, 6, 7)
    logits = network(features)
    assert (logits.position is not None) == position
    assert (logits.channel is not None) == channel
    torch.testing.assert_close(network.fused_logits(features), logits.fused)
    names = " ".join(dict(network.named_parameters()))
    assert ("position_" in names) == position
    assert ("channel_" in names) == channel
    assert ("plain_" in names) == (not position and not channel)


def test_dropout_drops_whole_channels_before_each_classifier() -> None:
    network = head()
    features = torch.rand(500, 16, 3, 2) + 1
    for classifier in (
        network.fused_classifier,
        network.position_classifier,
        network.channel_classifier,
        FCNHead(64, 3).classifier,
    ):
        classifier[-1] = torch.nn.Identity()
        factors = (classifier(features) / features).flatten(2)
        torch.testing.assert_close(factors, factors[..., :1].expand_as(factors))
        kept = factors[..., 0] > 0
        torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / 0.9))
        assert kept.float().mean().item() == pytest.approx(0.9, abs=0.02)
        assert torch.equal(classifier.eval()(features), features)


def test_auxiliary_head_has_a_quarter_of_c3s_width() -> None:
    network = FCNHead(1024, 19)
    assert network.reduce[0].weight.shape == (256, 1024, 3, 3)
    assert network(torch.randn(2, 1024, 2, 3)).shape == (2, 19, 2, 3)
