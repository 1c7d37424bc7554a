from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from danet.config import RunConfig
from danet.data import dataset_spec
from danet.training.build import build_model


@pytest.mark.parametrize(("mean", "notes"), [(None, 1), ((127.5, 127.5, 127.5), 0)])
def test_weights_of_another_normalization_are_noted(
    mean: tuple[float, float, float] | None, notes: int, tmp_path: Path
) -> None:
    """test_vit was trained with 1/2 as mean and deviation, not with ImageNet's."""
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    model = {"backbone": "test_vit", "backbone_weights": weights, "head_channels": 16}
    data = {} if mean is None else {"mean": mean, "std": mean}
    config = RunConfig.model_validate({"model": {**model, "key_channels": 4}, "data": data})
    said: list[str] = []
    build_model(config, dataset_spec("scenes"), None, said.append)
    assert len(said) == notes
    assert all("data.mean=[127.5, 127.5, 127.5]" in line for line in said)
