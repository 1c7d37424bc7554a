import itertools
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from danet.backbone import Backbone
from danet.errors import UserError


def build(name: str = "resnet18", **options: object) -> Backbone:
    torch.manual_seed(0)
    return Backbone(name, **{"pretrained": False, **options}).eval()


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_features_have_the_output_stride(output_stride: int) -> None:
    backbone = build(output_stride=output_stride)
    with torch.inference_mode():
        c3, c4 = backbone(torch.randn(1, 3, 97, 130))
    expected = (-(-97 // output_stride), -(-130 // output_stride))
    assert c4.shape == (1, 512, *expected)
    assert c3.shape[1] == 256
    assert c3.shape[2:] == (expected if output_stride < 32 else (7, 9))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_byobnet", "test_efficientnet"])
def test_other_families_give_the_output_stride_too(name: str) -> None:
    backbone = build(name, output_stride=16)
    with torch.inference_mode():
        features = backbone(torch.randn(1, 3, 97, 130))
    assert features.c4.shape == (1, backbone.c4_channels, 7, 9)
    assert features.c3.shape[1] == backbone.c3_channels


@pytest.mark.skipif(not timm.is_model("test_vit_relpos"), reason="this timm has no small one")
def test_a_network_of_one_size_sees_the_picture_resized() -> None:
    torch.manual_seed(0)
    backbone = Backbone("test_vit_relpos", pretrained=False).eval()
    assert backbone.fixed_size == (160, 160)
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        found = backbone(images).c4
        resized = torch.nn.functional.interpolate(images, size=(160, 160), mode="bilinear")
        c4 = backbone.body(resized)[-1]
        expected = torch.nn.functional.interpolate(c4, size=(9, 12), mode="bilinear")
    torch.testing.assert_close(found, expected)


def test_a_network_that_takes_no_larger_pictures_than_its_own_sees_them_resized() -> None:
    """Its positions are tables, which smaller pictures look up as well."""
    backbone = Backbone("mvitv2_tiny", pretrained=False).eval()
    assert backbone.fixed_size == (224, 224)
    with torch.no_grad():
        c4 = backbone(torch.randn(1, 3, 250, 64)).c4
    assert c4.shape == (1, backbone.c4_channels, 32, 8)


def test_looking_for_the_size_rule_changes_nothing() -> None:
    torch.manual_seed(0)
    before = Backbone("test_convnext", pretrained=False)
    assert before.training
    assert all(module.training for module in before.modules())
    state = torch.get_rng_state()
    torch.manual_seed(0)
    timm.create_model("test_convnext", pretrained=False, features_only=True)
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_published_dilations() -> None:
    """Published: stages 3 and 4 are dilated 2 and 4, their first block keeping the one before."""
    body = build("resnet50c").body
    for stage, first, rest in ((body.layer3, 1, 2), (body.layer4, 2, 4)):
        dilations = [block.conv2.dilation[0] for block in stage]
        assert dilations == [first] + [rest] * (len(stage) - 1)
        assert all(block.conv2.stride == (1, 1) for block in stage)


def test_strided_pointwise_convolutions_of_the_picture_read_only_what_they_need() -> None:
    """Where torch strides them itself, oneDNN's gradient of their weight overwrites memory."""
    backbone = build("mobileone_s0", output_stride=32)
    convolutions = [m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    narrow = [c for c in convolutions if c.kernel_size == (1, 1) and c.in_channels == 3]
    assert [c.stride for c in narrow] == [(1, 1)]
    torch.manual_seed(0)
    untouched = timm.create_model("mobileone_s0", features_only=True).eval()
    images = torch.randn(1, 3, 64, 97)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images).c4, untouched(images)[-1])
    images = images.to(memory_format=torch.channels_last)
    upstream = torch.randn(1, 48, 32, 49)
    (narrow[0](images) * upstream).sum().backward()
    expected = torch.einsum("bohw,bihw->oi", upstream.double(), images[..., ::2, ::2].double())
    torch.testing.assert_close(
        narrow[0].weight.grad[..., 0, 0], expected.float(), rtol=1e-3, atol=1e-3
    )


def test_multi_grid_sets_absolute_dilations() -> None:
    body = build("resnet50", multi_grid=(4, 8, 16)).body
    assert [block.conv2.dilation[0] for block in body.layer4] == [4, 8, 16]
    assert [block.conv2.padding[0] for block in body.layer4] == [4, 8, 16]


def test_multi_grid_dilates_both_convolutions_of_a_basic_block() -> None:
    """One changed pixel of c3 reaches just the pixels of c4 that its four convolutions lead to."""
    stage = build("resnet18", multi_grid=(2, 7)).body.layer4.double()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(0.1)  # positive, so that no path is cut off
        features = torch.zeros(1, 256, 1, 61, dtype=torch.float64)
        before = stage(features)
        features[..., 30] = 1
        reached = (stage(features) - before)[0, 0, 0].nonzero().flatten() - 30
    steps = [(-2, 0, 2), (-2, 0, 2), (-7, 0, 7), (-7, 0, 7)]
    assert reached.tolist() == sorted({sum(path) for path in itertools.product(*steps)})


def test_multi_grid_needs_a_fitting_resnet() -> None:
    with pytest.raises(UserError, match="multi_grid"):
        build("resnet18", multi_grid=(4, 8, 16))
    with pytest.raises(UserError, match="multi_grid"):
        build("test_vit", multi_grid=(4, 8, 16))


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = timm.create_model("test_resnet").state_dict()
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    body = build("test_resnet", weights=file).body
    loaded = body.state_dict()
    assert loaded.keys() <= state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"conv.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="lacks"):
        build("test_resnet", weights=file)


def test_weights_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)

    file = tmp_path / "weights.pt"
    torch.save({"conv.weight": Trap()}, file)
    with pytest.raises(UserError, match="backbone_weights"):
        build("test_resnet", weights=file)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet18_typo"}, "no 'resnet18_typo'; close: .*resnet18"),
        ({"name": "ResNet-18"}, "no 'ResNet-18'; close: .*resnet18"),
        ({"name": "resnet18.none"}, "could not be built .Invalid pretrained tag .none. for"),
        ({"weights": Path("nowhere.pth")}, "not a file"),
        ({"name": "resnet10t", "pretrained": True, "weights": None}, "hub|weights"),
        ({"output_stride": 7}, "output_stride"),
    ],
)
def test_mistakes_say_what_to_do(
    options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        build(**options)


def test_why_timm_could_not_build_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise TypeError("a stage went missing")

    monkeypatch.setattr("danet.backbone.timm.create_model", refuse)
    with pytest.raises(UserError, match=r"resnet18 .* feature maps \(a stage went missing\)"):
        Backbone("resnet18", pretrained=False)


def test_the_maps_format_does_not_depend_on_the_pictures_size() -> None:
    backbone = build("test_mambaout")
    # So tall that c3 has as many rows as channels before it is resized.
    images = torch.randn(1, 3, 16 * backbone.c3_channels, 64)
    with torch.inference_mode():
        c3 = backbone(images).c3
        maps = backbone.body(images)[-2].permute(0, 3, 1, 2)
    assert maps.shape[1] == maps.shape[2] == backbone.c3_channels
    torch.testing.assert_close(c3, F.interpolate(maps, size=c3.shape[-2:], mode="bilinear"))


def test_weights_may_be_a_plain_string() -> None:
    with pytest.raises(UserError, match="is not a file"):
        build(weights="nowhere.pth")
