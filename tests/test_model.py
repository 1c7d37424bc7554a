import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import danet
from danet.config import ModelConfig
from danet.errors import UserError
from danet.heads import DualAttentionHead
from danet.model_folder import Metadata


def build(**options: object) -> danet.DANet:
    torch.manual_seed(0)
    settings = {
        "backbone": "test_resnet",
        "pretrained_backbone": False,
        "head_channels": 16,
        "key_channels": 4,
    }
    return danet.DANet(5, **{**settings, **options})


def randomized(model: danet.DANet) -> danet.DANet:
    """Residual weights, scales and statistics away from their start, where mistakes hide."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 and name.endswith(("weight", "running_mean", "running_var")):
                tensor.uniform_(0.5, 1.5)
    return model


def test_output_is_at_the_feature_stride() -> None:
    output = build()(torch.randn(2, 3, 65, 50))
    assert {part.shape for part in output} == {(2, 5, 9, 7)}


def test_published_size() -> None:
    """Published: 49.85 M parameters for a ResNet-50 with 19 classes, auxiliary head included."""
    with torch.device("meta"):
        model = danet.DANet(19, pretrained_backbone=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 49_846_574


@pytest.mark.parametrize("align_corners", [False, True])
def test_predict_logits_are_the_fused_ones_upsampled(align_corners: bool) -> None:
    model = randomized(build(align_corners=align_corners)).eval()
    images = torch.randn(1, 3, 65, 50)
    expected = torch.nn.functional.interpolate(
        model(images).fused, size=(65, 50), mode="bilinear", align_corners=align_corners
    )
    torch.testing.assert_close(model.predict_logits(images), expected)


@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("channel", [True, False])
def test_branches_are_the_classifiers_that_give_logits(position: bool, channel: bool) -> None:
    network = build(position=position, channel=channel).eval()
    logits = network(torch.zeros(1, 3, 32, 32))
    given = [name for name in ("fused", "position", "channel") if getattr(logits, name) is not None]
    assert network.branches == tuple(given)


def test_every_parameter_gets_a_gradient() -> None:
    model = randomized(build())
    sum(part.square().sum() for part in model(torch.randn(2, 3, 64, 64))).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to a query's scores cancels in the softmax, so the key's bias learns nothing.
    assert without in ([], ["head.position_branch.attention.key.bias"])


def test_model_folder_round_trip(tmp_path: Path) -> None:
    metadata = Metadata(
        classes=("a", "b", "ä", "d", "e"),
        palette=tuple((i, 2 * i, 3 * i) for i in range(5)),
        mean=(1, 2, 3),
        dataset="folder",
    )
    model = randomized(build(metadata=metadata, align_corners=True)).eval()
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = danet.DANet.from_pretrained(tmp_path / "model")
    assert loaded.metadata == metadata
    assert loaded.config == model.config
    assert not loaded.training
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(loaded.predict_logits(images), model.predict_logits(images))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        build().save_pretrained(tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


class TestDamagedFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        build().save_pretrained(tmp_path)
        return tmp_path

    def fails(self, folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            danet.DANet.from_pretrained(folder)

    def test_missing_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        self.fails(folder, "needs config.json and model.safetensors")

    def test_truncated_weights(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self.fails(folder, "damaged")

    def test_weights_of_another_shape(self, folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state["head.fused_classifier.1.weight"] = torch.zeros(7, 16, 1, 1)
        save_file(state, folder / "model.safetensors")
        self.fails(folder, "do not fit")

    def test_weights_of_less_than_the_config_says(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A small file must not have any amount of memory taken."""

        def without_memory(*sizes: int, **settings: object) -> DualAttentionHead:
            head = DualAttentionHead(*sizes, **settings)
            assert all(parameter.is_meta for parameter in head.parameters())
            return head

        config = json.loads((folder / "config.json").read_text())
        config["model"]["head_channels"] = 4096
        (folder / "config.json").write_text(json.dumps(config))
        state = load_file(folder / "model.safetensors")
        few = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        save_file(few, folder / "model.safetensors")
        monkeypatch.setattr("danet.model.DualAttentionHead", without_memory)
        self.fails(folder, "do not fit")

    def test_no_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        self.fails(folder, "not valid JSON")

    @pytest.mark.parametrize(
        ("section", "key", "value", "message"),
        [
            ("model", "backbon", "x", "did you mean backbone"),
            ("metadata", "classes", ["a"], "1 classes but 5 colours"),
            ("metadata", "palette", [[0, 0, 300]] * 5, "palette"),
        ],
    )
    def test_config_out_of_bounds(
        self, folder: Path, section: str, key: str, value: object, message: str
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        config[section][key] = value
        (folder / "config.json").write_text(json.dumps(config))
        self.fails(folder, message)

    def test_no_such_folder(self, tmp_path: Path) -> None:
        self.fails(tmp_path / "nowhere", "no such folder")


def test_a_run_folder_gives_its_model(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match="no model yet"):
        danet.DANet.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path / "model")
    assert danet.DANet.from_pretrained(tmp_path).config.head_channels == 16


def test_design_signature_is_what_the_config_takes() -> None:
    """`from_config` passes every architectural key to the constructor by its name."""
    config = ModelConfig(
        backbone="test_resnet",
        pretrained_backbone=False,
        head_channels=16,
        key_channels=4,
        channel_affinity="paper",
        position=False,
        auxiliary=False,
    )
    model = danet.DANet.from_config(config, Metadata.placeholder(3))
    assert model.config == config
    assert model.head.channel_branch.attention.affinity == "paper"
    assert model.auxiliary_head is None
    assert model.head.position_branch is None


def test_constructors_and_recipes_have_the_same_defaults() -> None:
    config = ModelConfig()
    names = {"channels": "head_channels", "affinity": "channel_affinity"}
    for build_part in (danet.DANet, DualAttentionHead):
        for name, parameter in inspect.signature(build_part).parameters.items():
            setting = names.get(name, name)
            if setting in ModelConfig.model_fields and parameter.default is not parameter.empty:
                assert parameter.default == getattr(config, setting), name


def test_number_of_classes_and_names_must_agree() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        build(metadata=Metadata.placeholder(4))


def test_numpys_whole_numbers_count_classes() -> None:
    assert danet.DANet(np.int64(3), "test_resnet", pretrained_backbone=False).metadata == (
        Metadata.placeholder(3)
    )


@pytest.mark.parametrize(
    ("num_classes", "options", "message"),
    [
        (0, {}, "num_classes is 0; it must be 1 to 255, because masks are 8 bit"),
        (300, {}, "num_classes is 300; it must be 1 to 255, because masks are 8 bit"),
        (5.0, {}, "num_classes is 5.0; it must be 1 to 255, because masks are 8 bit"),
        ("5", {}, "num_classes is '5'; it must be 1 to 255, because masks are 8 bit"),
        (True, {}, "num_classes is True; it must be 1 to 255, because masks are 8 bit"),
        (
            11,
            {"multi_grid": ()},
            "multi_grid: Tuple should have at least 1 item after validation, not 0",
        ),
        (11, {"multi_grid": 4}, "multi_grid: write a list in brackets, such as [1, 2]"),
        (11, {"multi_grid": "48"}, "multi_grid: write a list in brackets, such as [1, 2]"),
        (11, {"metadata": {}}, "metadata is {}; it must be a danet.model_folder.Metadata"),
        (
            11,
            {"backbone_weights": 5},
            "backbone_weights: give a file's path",
        ),
        (
            11,
            {"pretrained_backbone": "maybe"},
            "pretrained_backbone: Input should be a valid boolean, unable to interpret input",
        ),
        (11, {"output_stride": 7}, "output_stride: Input should be 8, 16 or 32"),
        (
            11,
            {"head_channels": 0, "multi_grid": (4, 8, 65)},
            "head_channels: Input should be greater than or equal to 1; "
            "multi_grid.2: Input should be less than or equal to 64",
        ),
    ],
)
def test_an_argument_out_of_range_is_named_in_one_line(
    num_classes: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        danet.DANet(num_classes, "test_resnet", **{"pretrained_backbone": False, **options})
    assert str(caught.value) == message


def test_tied_weights_are_saved_and_read(tmp_path: Path) -> None:
    model = build()
    model.head.channel_branch.refine[0].weight = model.head.position_branch.refine[0].weight
    model.save_pretrained(tmp_path)
    read = danet.DANet.from_pretrained(tmp_path).head
    for branch in (read.channel_branch, read.position_branch):
        assert torch.equal(branch.refine[0].weight, model.head.position_branch.refine[0].weight)


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    changed = build()
    changed.head.fused_classifier[1] = nn.Conv2d(16, 9, 1)
    renamed = build()
    renamed.metadata = Metadata.placeholder(7)
    for model in (changed, renamed):
        with pytest.raises(UserError, match=r"weight is \dx16x1x1, not \dx16x1x1, by the n"):
            model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    danet.DANet.from_pretrained(tmp_path)


def test_an_empty_name_is_not_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what a shell makes of a variable that is not set."""
    build().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="name is empty"):
        danet.DANet.from_pretrained("")
    with pytest.raises(UserError, match="empty name"):
        build().save_pretrained("")


def test_weights_of_another_kind_of_number_are_refused(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "head.fused_classifier.1.weight"
    save_file({**stored, name: stored[name].cfloat()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name} holds complex64, not floating point"):
        danet.DANet.from_pretrained(tmp_path)


def test_a_network_is_what_its_config_says() -> None:
    model = build(auxiliary="no", head_channels="16")
    assert model.auxiliary_head is None
    again = danet.DANet.from_config(model.config, model.metadata)  # without asking the hub
    assert again.state_dict().keys() == model.state_dict().keys()


def test_counters_of_batches_may_be_missing(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    few = {n: tensor for n, tensor in state.items() if not n.endswith("num_batches_tracked")}
    assert len(few) < len(state)
    save_file(few, tmp_path / "model.safetensors")
    loaded = danet.DANet.from_pretrained(tmp_path).state_dict()
    assert not any(tensor.is_meta for tensor in loaded.values())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_half_precision_keeps_what_it_cannot_hold(tmp_path: Path) -> None:
    model = build()
    model.head.position_branch.refine[1].running_var.fill_(1e5)
    model.save_pretrained(tmp_path, half=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["head.position_branch.refine.1.running_var"].dtype == torch.float32
    assert stored["head.position_branch.refine.1.running_mean"].dtype == torch.float16
    loaded = danet.DANet.from_pretrained(tmp_path)
    assert loaded.head.position_branch.refine[1].running_var.eq(1e5).all()


def test_a_folder_has_no_other_files_read(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["backbone_weights"] = str(tmp_path / "not_to_be_read")
    (tmp_path / "config.json").write_text(json.dumps(config))
    danet.DANet.from_pretrained(tmp_path)


def test_a_model_folder_may_hold_its_recipe(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    (tmp_path / "recipe.yaml").write_text("train: {steps: 1}\n")
    danet.DANet.from_pretrained(tmp_path)
