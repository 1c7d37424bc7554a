import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

import danet
from danet.data import open_dataset
from danet.errors import UserError
from danet.model_card import write_model_card
from danet.model_folder import Metadata, read_folder, shipped_models
from danet.palette import default_palette
from danet.recipes import load_recipe
from hub import serving_hub
from networks import tiny_danet


def network() -> danet.DANet:
    metadata = Metadata(
        classes=("sky", "road"), palette=default_palette(2), dataset="camvid", std=(60, 61, 62)
    )
    return tiny_danet(2, metadata=metadata)


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("train:\n  steps: 7\n")
    rows = [{"step": 5, "loss": 2.0}]
    rows += [
        {"step": s, "val/mIoU": m, "val/mAcc": 0.8, "val/aAcc": 0.9}
        for s, m in [(5, 0.1), (7, 0.7012)]
    ]
    rows += [{"step": 8, "val/mIoU": 0.9}, {"val/mIoU": "much", "val/mAcc": 1, "val/aAcc": 1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = f"""
        import danet, torch
        from PIL import Image
        model = danet.DANet.from_pretrained({str(tmp_path / "model")!r})
        address = model.push_to_hub(
            "me/streets", run={str(run)!r}, picture=Image.new("RGB", (40, 30)), license_id="mit",
            token="hf_" + 34 * "x",
        )
        print(address)
        again = danet.DANet.from_pretrained("me/streets")
        assert again.metadata == model.metadata
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
        try:
            danet.DANet.from_pretrained("me/absent")
        except danet.UserError as error:
            assert "could not be fetched from the hub" in str(error)
        else:
            raise AssertionError
    """
    with serving_hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert f"{hub.address}/me/streets" in done.stdout
        files = hub.repositories["me/streets"]
    assert set(files) >= {"config.json", "model.safetensors", "README.md", "example.jpg"}
    _, front, text = files["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["license"] == "mit"
    assert card["datasets"] == ["camvid"]
    metrics = card["model-index"][0]["results"][0]["metrics"]
    assert {m["type"]: m["value"] for m in metrics} == {"mIoU": 70.12, "mAcc": 80, "aAcc": 90}
    for expected in ("sky, road", "example.jpg", "steps: 7", "danet predict me/streets"):
        assert expected in text


def test_a_hub_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no/valid/id: not a valid hub id; give OWNER/NAME"):
        network().push_to_hub("no/valid/id")
    with pytest.raises(UserError, match="me/streets: could not be uploaded"):
        network().push_to_hub("me/streets")
    network().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="have revisions"):
        danet.DANet.from_pretrained(tmp_path, revision="v9")
    with pytest.raises(UserError, match="have revisions"):
        danet.DANet.from_pretrained("street-small", revision="v9")


def test_half_precision_is_half_the_size_and_nearly_the_same(tmp_path: Path) -> None:
    model = network()
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", half=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    assert all(
        tensor.dtype != torch.float32 for tensor in read_folder(tmp_path / "half")[1].values()
    )
    images = torch.randn(1, 3, 40, 50)
    with torch.no_grad():
        expected = model.predict_logits(images)
        found = danet.DANet.from_pretrained(tmp_path / "half").predict_logits(images)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)


def test_a_model_that_is_nowhere_names_those_that_come_along() -> None:
    with pytest.raises(danet.UserError, match="that comes with danet"):
        danet.DANet.from_pretrained("no-such-model")
    assert "street-small" in shipped_models()
    for name, folder in shipped_models().items():
        assert danet.DANet.from_pretrained(name).metadata == read_folder(folder)[0].metadata


def test_the_model_that_comes_along_knows_streets() -> None:
    predictor = danet.Predictor("street-small", device="cpu")
    scenes = open_dataset("scenes", split="val")
    right = [(predictor(scenes[i].image).classes == scenes[i].label).mean() for i in range(3)]
    assert min(right) > 0.85


def test_a_card_scores_the_weights_that_were_kept(tmp_path: Path) -> None:
    """Not those of another protocol, which the run had been validated by before."""
    model = network()
    model.save_pretrained(tmp_path / "model")
    recipe = load_recipe("demo", ["train.keep=best", "train.validate_images=20"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    scored = [(2, 0.9), (2, 0.2), (4, 0.4), (6, 0.3)]
    rows = [
        {"step": step, **{f"val/{name}": score for name in ("mIoU", "mAcc", "aAcc")}}
        for step, score in scored
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "checkpoints").mkdir()
    torch.save({"best": {"step": 4, "mIoU": 0.4}}, tmp_path / "checkpoints/best.ckpt")
    write_model_card(tmp_path / "model", "m", model.config, model.metadata, run=tmp_path)
    card = (tmp_path / "model/README.md").read_text()
    assert "40.00 on the first 20 pictures of the validation split" in card
    (tmp_path / "checkpoints/best.ckpt").unlink()
    write_model_card(tmp_path / "model", "m", model.config, model.metadata, run=tmp_path)
    assert "90.00" in (tmp_path / "model/README.md").read_text()


def test_a_card_tells_no_paths(tmp_path: Path) -> None:
    model = network()
    model.save_pretrained(tmp_path / "model")
    settings = [f"data.root={tmp_path}", f"model.init_from={tmp_path}"]
    settings += [f"data.extra=[{{name: scenes, root: {tmp_path}, images: 5}}]"]
    (tmp_path / "recipe.yaml").write_text(load_recipe("demo", settings).to_yaml())
    write_model_card(tmp_path / "model", "m", model.config, model.metadata, run=tmp_path)
    card = (tmp_path / "model/README.md").read_text()
    assert "images: 5" in card
    assert str(tmp_path) not in card


def test_a_card_shows_odd_names_as_text(tmp_path: Path) -> None:
    names = ("a|b", "c\nd", "<b>x</b>")
    metadata = Metadata(classes=names, palette=default_palette(3))
    tiny_danet(3, metadata=metadata).save_pretrained(tmp_path)
    stored, _ = read_folder(tmp_path)
    write_model_card(tmp_path, "m", stored.model, stored.metadata)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert r"| classes | 3: a\|b, c d, &lt;b&gt;x&lt;/b&gt; |" in lines
