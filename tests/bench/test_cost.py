from collections.abc import Callable

import pytest
import torch

from danet.bench import cost
from danet.bench.cost import (
    LARGEST_BATCH,
    cost_by_part,
    estimate_peak_bytes,
    largest_batch,
    process_bytes,
)
from danet.bench.measure import Form, measure
from danet.bench.workload import Workload
from danet.config import RunConfig
from danet.recipes import load_recipe

MIB = 2**20
R50 = "cityscapes_r50_512x1024_40k"


def small(**train: object) -> RunConfig:
    model = {"backbone": "test_resnet", "head_channels": 32, "key_channels": 8}
    return RunConfig.model_validate({"model": model, "train": train})


def workload(config: RunConfig, size: tuple[int, int] = (64, 48), batch: int = 1) -> Workload:
    return Workload(config, size, batch, "training")


def test_parts_are_the_whole() -> None:
    job = workload(small())
    parts = {part.name: part for part in cost_by_part(job)}
    model = job.build_model()
    assert sum(part.parameters for part in parts.values()) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    positions, channels, classes = 8 * 6, 32, len(model.metadata.classes)
    c4 = model.backbone.c4_channels
    convolutions = 9 * channels * (c4 + channels)
    products = positions * positions * (8 + channels)
    projections = positions * channels * (8 + 8 + channels)
    assert parts["head.position_branch"].operations == 2 * (
        positions * convolutions + products + projections
    )
    assert parts["head.channel_branch"].operations == 2 * (
        positions * convolutions + 2 * positions * channels**2
    )
    assert parts["head"].operations == 2 * positions * 3 * channels * classes


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "regnety_002", "convnext_atto"])
@pytest.mark.parametrize("mode", ["training", "prediction"])
def test_networks_that_look_at_data_while_they_are_built(backbone: str, mode: str) -> None:
    """As for the rates of stochastic depth."""
    model = {"backbone": backbone, "head_channels": 32, "key_channels": 8}
    job = Workload(RunConfig.model_validate({"model": model}), (64, 64), 2, mode)
    weights = sum(parameter.nbytes for parameter in job.build_model().parameters())
    copies = 3 if mode == "training" else 1  # gradients and momentum
    assert estimate_peak_bytes(job, "cpu", bfloat16=False) > copies * weights


def test_a_network_of_one_size_costs_the_same_at_any() -> None:
    model = {"backbone": "mvitv2_tiny", "head_channels": 32, "key_channels": 8}
    config = RunConfig.model_validate({"model": model})
    costs = [
        {part.name: part.operations for part in cost_by_part(workload(config, size))}
        for size in ((64, 64), (448, 448))
    ]
    assert costs[0]["backbone"] == costs[1]["backbone"] > 0


def test_memory_grows_with_pictures_and_their_size() -> None:
    def estimate(size: tuple[int, int], batch: int) -> int:
        return estimate_peak_bytes(workload(small(), size, batch), "cpu", bfloat16=False)

    assert estimate((128, 96), 1) < estimate((128, 96), 2) < estimate((256, 192), 2)


@pytest.mark.parametrize("mode", ["training", "prediction"])
@pytest.mark.parametrize(
    ("config", "size", "room"),
    [
        (small(), (128, 96), 256 * MIB),
        pytest.param(load_recipe(R50), (64, 48), 1024 * MIB, marks=pytest.mark.slow),
    ],
    ids=["small", "ResNet-50"],
)
def test_the_largest_batch_fits_and_one_more_does_not(
    config: RunConfig, size: tuple[int, int], room: int, mode: str
) -> None:
    job = Workload(config, size, 1, mode)
    limit = process_bytes("cpu") + room
    found = largest_batch(job, "cpu", bfloat16=False, limit=limit)
    needs, too_much = (
        estimate_peak_bytes(job._replace(batch=batch), "cpu", bfloat16=False)
        for batch in (found.batch, found.batch + 1)
    )
    assert needs <= room < too_much
    assert found.further_bytes == too_much - needs


def test_backbones_that_need_two_pictures_have_an_estimate() -> None:
    """Their batch norms follow global pooling, so one picture leaves them a single value."""
    config = load_recipe("demo", ["model.backbone=skresnet18", "model.head_channels=16"])
    job = Workload(config, (64, 64), 1, "training")
    needed = estimate_peak_bytes(job._replace(batch=2), "cpu", bfloat16=False)
    limit = process_bytes("cpu") + needed
    assert largest_batch(job, "cpu", bfloat16=False, limit=limit).batch == 2
    assert largest_batch(job, "cpu", bfloat16=False, limit=limit - 1).batch == 0


@pytest.mark.parametrize("room", [2, 700, 1_020, 1_100, 5_000, 60_000])
@pytest.mark.parametrize(
    "need",
    [
        lambda batch: 9 * batch,
        lambda batch: max(1_000 + batch // 8, 13 * batch),  # few are less than setting up
        lambda batch: max(1_000, 700 + batch),
        lambda batch: 40 * (1 + batch // 3) + 4 * batch,
    ],
    ids=["line", "bend", "late bend", "stairs"],
)
def test_few_estimates_find_the_largest_batch(
    need: Callable[[int], int], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimated = []

    def estimate(workload: Workload, device: str, *, bfloat16: bool) -> int:
        estimated.append(workload.batch)
        return need(workload.batch)

    monkeypatch.setattr(cost, "estimate_peak_bytes", estimate)
    limit = process_bytes("cpu") + room
    found = largest_batch(workload(small()), "cpu", bfloat16=False, limit=limit)
    fitting = [batch for batch in range(1, LARGEST_BATCH + 1) if need(batch) <= room]
    assert found.batch == max(fitting, default=0)
    assert found.first_bytes == need(1)
    assert len(estimated) <= 18
    assert max(estimated) <= max(2, 8 * found.batch)  # training on more takes longer to estimate


def test_a_gpus_estimate_has_none_of_the_cpus_convolutions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Winograd's filters are four times as large, and are not what a GPU convolves with."""
    taken: list[object] = []
    monkeypatch.setattr("danet.winograd.WinogradConv2d.__init__", lambda *_, **__: taken.append(1))
    monkeypatch.setattr("danet.training.build.use_winograd", taken.append)
    for mode in ("prediction", "training"):
        job = Workload(load_recipe("demo", ["model.head_channels=256"]), (64, 64), 2, mode)
        assert estimate_peak_bytes(job, "cuda", bfloat16=False) > 0
    assert not taken


def test_advice_takes_no_batch_that_cannot_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "memory_limit", lambda _: 1 << 20)
    settings = ["model.backbone=skresnet18", "model.head_channels=16", "train.batch_size=2"]
    advice = cost.advise_after_running_out(load_recipe("demo", settings), 1)
    assert "lower data.crop_size" in advice


def test_checkpointing_needs_less_memory() -> None:
    plain, early, checkpointed = (
        estimate_peak_bytes(workload(config, (256, 256), 4), "cpu", bfloat16=False)
        for config in (
            load_recipe(R50, [f"train.activation_checkpointing={which}"])
            for which in ("false", "early", "true")
        )
    )
    assert checkpointed < early < plain


@pytest.mark.parametrize(
    "train",
    [
        {"loss_divisor": "valid"},
        {"class_weights": (1.0,) * 11, "loss_divisor": "valid"},
        {"hard_example_threshold": 0.7},
    ],
)
def test_every_loss_can_be_estimated(train: dict[str, object]) -> None:
    """On tensors without data, so nothing in a step may ask the device for a value."""
    assert estimate_peak_bytes(workload(small(**train)), "cpu", bfloat16=False) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "size"), [("training", (256, 192)), ("prediction", (384, 256))])
def test_estimates_are_within_15_percent_of_what_is_measured(
    mode: str, size: tuple[int, int]
) -> None:
    job = Workload(load_recipe(R50), size, 2, mode)
    measured = measure(job, [Form("danet", bfloat16=False)], "cpu", rounds=1, repeats=1)["danet"]
    assert measured is not None
    estimate = estimate_peak_bytes(job, "cpu", bfloat16=False)
    assert estimate == pytest.approx(measured.peak_bytes, rel=0.15)


def test_materialized_form_computes_the_same() -> None:
    job = Workload(small(), (64, 48), 1, "prediction")
    ours, theirs = (
        job.prepare(torch.device("cpu"), bfloat16=False, materialized=materialized)
        for materialized in (False, True)
    )
    with torch.no_grad():
        for model in (ours.model, theirs.model):
            model.head.position_branch.attention.residual_weight.fill_(1.0)
        torch.testing.assert_close(
            ours.model.fused_logits(ours.images), theirs.model.fused_logits(theirs.images)
        )
