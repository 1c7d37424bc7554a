from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import danet
from danet.errors import (
    UserError,
)
from networks import tiny_danet
from tiny_runs import run


def test_there_is_a_weight_for_each_class(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"class_weights: 2 weights, but scenes has 11 classes"):
        run(tmp_path / "run", "train.class_weights=[1, 2]")
    assert not (tmp_path / "run").exists()


class TestInitFrom:
    def test_same_classes_take_every_weight(self, tmp_path: Path) -> None:
        source = run(tmp_path / "source")
        target = run(
            tmp_path / "target",
            f"model.init_from={source.model}",
            "train.steps=1",
            "train.lr=1e-12",
            "train.ema_decay=null",
        )
        before = load_file(source.model / "model.safetensors")
        after = load_file(target.model / "model.safetensors")
        names = [name for name in before if name.endswith(("weight", "bias"))]
        for name in names:
            torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-6)

    def test_other_classes_leave_out_the_classifiers(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.manual_seed(0)
        source = danet.DANet(
            3, "test_resnet", pretrained_backbone=False, head_channels=16, key_channels=4,
            auxiliary=False,
        )  # fmt: skip
        source.save_pretrained(tmp_path / "source")
        settings = (f"model.init_from={tmp_path / 'source'}", "train.steps=1", "train.lr=1e-12")
        target = run(tmp_path / "target", *settings, "train.ema_decay=null")
        assert "all but the classifiers" in capsys.readouterr().err
        after = load_file(target.model / "model.safetensors")
        assert after["head.fused_classifier.1.weight"].shape[0] == 11
        name = "head.position_branch.reduce.0.weight"
        torch.testing.assert_close(after[name], source.state_dict()[name], rtol=1e-4, atol=1e-6)

    def test_as_many_other_classes_leave_out_the_classifiers(self, tmp_path: Path) -> None:
        source = tiny_danet(11, auxiliary=False)
        source.save_pretrained(tmp_path / "source")
        settings = (f"model.init_from={tmp_path / 'source'}", "train.steps=1", "train.lr=1e-12")
        target = run(tmp_path / "target", *settings, "train.ema_decay=null")
        after = load_file(target.model / "model.safetensors")
        convolutions = {name: t for name, t in source.state_dict().items() if t.ndim == 4}
        taken = {name for name, t in convolutions.items() if torch.allclose(after[name], t)}
        assert taken == {name for name in convolutions if "classifier" not in name}

    def test_another_network_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = run(tmp_path / "source", "train.steps=1", "model.channel=false")
        given = (f"model.init_from={source.model}", "model.channel=false")
        with pytest.raises(UserError, match="another network"):
            run(tmp_path / "target", *given, "model.head_channels=8")
        with pytest.raises(
            UserError, match=r"\d tensors do not fit, first: head\.channel.* missing"
        ):
            run(tmp_path / "target", *given, "model.channel=true")
        assert "weights from" not in capsys.readouterr().err

    @pytest.mark.parametrize("auxiliary", [False, True])
    def test_an_auxiliary_head_that_one_lacks_is_left_out(
        self, auxiliary: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = run(tmp_path / "source", "train.steps=1", f"model.auxiliary={auxiliary}".lower())
        other = f"model.auxiliary={not auxiliary}".lower()
        run(tmp_path / "target", f"model.init_from={source.model}", "train.steps=1", other)
        said = capsys.readouterr().err
        assert "all but the auxiliary head, which only one of both has" in said
