import math

import numpy as np
import pytest
import torch
from PIL import Image

import danet
from danet.config import TestConfig
from danet.data import open_dataset
from danet.data.spec import DatasetSpec, Sample
from danet.errors import UserError
from danet.evaluation.evaluate import (
    Evaluation,
    PictureScore,
    check_classes,
    evaluate,
    merge,
    scores_as_json,
    segment_with,
)
from danet.evaluation.report import report_cases
from networks import tiny_danet

TEST = TestConfig(scale=(96, 72))


@pytest.fixture(scope="module")
def model() -> danet.DANet:
    return tiny_danet(11)


def test_counts_every_labelled_pixel_once(model: danet.DANet) -> None:
    dataset = open_dataset("scenes", split="val")
    branches = model.branches
    segment = segment_with(model, TEST, "fp32", branches)
    result = evaluate(segment, dataset, branches=branches, indices=range(3))
    truth = np.concatenate([dataset[i].label.ravel() for i in range(3)])
    expected = [int((truth == k).sum()) for k in range(11)]
    for branch in ("fused", "position", "channel"):
        assert result.confusion[branch].sum(1).tolist() == expected
    assert [p.name for p in result.pictures] == [dataset[i].name for i in range(3)]
    by_picture = danet.Predictor(model, "cpu", "fp32", TEST)
    right = sum(
        int((by_picture(dataset[i].image).classes == dataset[i].label).sum()) for i in range(3)
    )
    assert result.confusion["fused"].diagonal().sum() == right


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_network_computes_in_the_precision_that_is_asked_for(
    precision: str, dtype: torch.dtype, model: danet.DANet
) -> None:
    sample = open_dataset("scenes", split="val")[0]
    found: list[torch.dtype] = []
    layer = model.head.fused_classifier[1]
    with layer.register_forward_hook(lambda _, __, output: found.append(output.dtype)):
        segment_with(model, TEST, precision)(sample)
    assert found == [dtype]


def test_parts_add_up_to_the_whole(model: danet.DANet) -> None:
    dataset = open_dataset("scenes", split="val")
    segment = segment_with(model, TEST)
    whole = evaluate(segment, dataset, indices=range(4))
    parts = [evaluate(segment, dataset, indices=range(r, 4, 3)) for r in range(3)]
    merged = merge(parts)
    assert torch.equal(merged.confusion["fused"], whole.confusion["fused"])
    assert merged.pictures == whole.pictures


def test_a_picture_without_labels_has_no_accuracy() -> None:
    """By hand: three of four labelled pixels are right, and then there is none."""
    image = Image.new("RGB", (3, 2))
    labels = ([[0, 1, 1], [1, 255, 255]], [[255] * 3] * 2)

    class Labelled:
        spec = DatasetSpec("two", ("a", "b"))

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Sample:
            return Sample(image, np.array(labels[index], np.uint8), "ab"[index])

    result = evaluate(lambda _: [torch.ones(2, 3, dtype=torch.uint8)], Labelled())
    assert [(p.position, p.name) for p in result.pictures] == [(0, "a"), (1, "b")]
    assert result.pictures[0].accuracy == 3 / 4
    assert math.isnan(result.pictures[1].accuracy)
    assert result.confusion["fused"].tolist() == [[0, 1], [0, 3]]


def test_few_pictures_are_decoded_ahead(model: danet.DANet) -> None:
    """And what is wrong with one is said when it is its turn."""
    scenes = open_dataset("scenes", split="val")
    read, scored, ahead = [], [], []

    class Watched:
        spec = scenes.spec

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Sample:
            read.append(index)
            ahead.append(len(read) - len(scored))
            if index == 10:
                raise UserError("picture 10 is broken")
            return scenes[index]

    segment = segment_with(model, TEST, "fp32")
    with pytest.raises(UserError, match="picture 10 is broken"):
        evaluate(segment, Watched(), on_picture=lambda: scored.append(1))
    assert len(scored) == 10
    assert max(ahead) <= 4


def test_another_number_of_classes_is_refused(model: danet.DANet) -> None:
    with pytest.raises(UserError, match="11 classes but dataset other has 2"):
        check_classes(model.metadata, DatasetSpec("other", ("a", "b")))


def test_other_names_of_as_many_classes_are_told(model: danet.DANet) -> None:
    names = model.metadata.classes
    said: list[str] = []
    check_classes(model.metadata, DatasetSpec("same", names), said.append)
    assert said == []
    check_classes(model.metadata, DatasetSpec("other", (*names[:9], "a", "b")), said.append)
    assert len(said) == 1
    assert said[0].startswith(
        "note: 2 of 11 class names are not those of dataset other, first that of class 9: "
        "'class 9', not 'a';"
    )


def test_cases_are_the_worst_first_then_a_spread(model: danet.DANet) -> None:
    dataset = open_dataset("scenes", split="val")
    pictures = [PictureScore(i, dataset[i].name, 1 - i / 10) for i in range(8)]
    pictures.append(PictureScore(8, "unlabelled", math.nan))
    cases = report_cases(segment_with(model, TEST), dataset, pictures, worst=2, others=2)
    assert [case.name[-1] for case in cases] == ["7", "6", "4", "1"]


def test_json_has_the_promised_keys() -> None:
    spec = DatasetSpec("other", ("a", "b", "c"))
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    result = Evaluation(spec, {"fused": confusion}, [PictureScore(0, "x", 7 / 8)])
    tree = scores_as_json(result)
    assert tree["mIoU"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert tree["aAcc"] == pytest.approx(7 / 8)
    assert tree["mAcc"] == pytest.approx((3 / 4 + 1) / 2)
    assert tree["per_class"]["a"] == {"IoU": 0.75, "Acc": 0.75}
    assert tree["per_class"]["c"] == {"IoU": None, "Acc": None}
    assert tree["confusion"] == confusion.tolist()
    assert tree["images"] == 1
