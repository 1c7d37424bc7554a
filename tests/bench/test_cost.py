import pytest
import torch

from danet.bench.cost import cost_by_part, estimate_peak_bytes, largest_batch, process_bytes
from danet.bench.measure import Form, measure
from danet.bench.workload import Workload
from danet.config import RunConfig, load_recipe

MIB = 2**20


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


def test_memory_grows_with_pictures_and_their_size() -> None:
    def estimate(size: tuple[int, int], batch: int) -> int:
        return estimate_peak_bytes(workload(small(), size, batch), "cpu", bfloat16=False)

    assert estimate((128, 96), 1) < estimate((128, 96), 2) < estimate((256, 192), 2)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    held = process_bytes("cpu")
    job, limit = workload(small(), (128, 96)), held + 256 * MIB
    found = largest_batch(job, "cpu", bfloat16=False, limit=limit)
    needs = [
        held + estimate_peak_bytes(job._replace(batch=batch), "cpu", bfloat16=False)
        for batch in (found.batch, found.batch + 1)
    ]
    assert needs[0] <= limit < needs[1]
    assert largest_batch(job, "cpu", bfloat16=False, limit=held + MIB).batch == 0


def test_checkpointing_needs_less_memory() -> None:
    plain, early, checkpointed = (
        estimate_peak_bytes(workload(small(**train), (256, 256), 4), "cpu", bfloat16=False)
        for train in (
            {},
            {"activation_checkpointing": "early"},
            {"activation_checkpointing": True},
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
@pytest.mark.parametrize("mode", ["training", "prediction"])
def test_estimates_are_within_15_percent_of_what_is_measured(mode: str) -> None:
    config = load_recipe("cityscapes_r50_512x1024_40k")
    job = Workload(config, (384, 256), 2, mode)
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
