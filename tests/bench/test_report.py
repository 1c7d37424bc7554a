import pytest

from danet.bench.cost import LARGEST_BATCH, BatchLimit, estimate_peak_bytes
from danet.bench.report import estimate_limits, limits_as_json, print_limits
from danet.bench.workload import Workload
from danet.config import RunConfig
from danet.recipes import load_recipe

MIB = 2**20


def test_a_search_that_ended_before_memory_did_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    limits = [
        (
            Workload(RunConfig(), (side, side), 1, "prediction"),
            BatchLimit(batch, 9 * MIB, 2 * MIB, 9 * MIB),
        )
        for side, batch in ((8, LARGEST_BATCH), (64, 12), (512, 0))
    ]
    print_limits(limits, 1024 * MIB, "cuda")
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [" ".join(row.split()) for row in rows] == [
        "8x8 4096 or more 9 2",
        "64x64 12 9 2",
        "512x512 none fits 9 2",
    ]
    written = limits_as_json(limits, 1024 * MIB, "cuda")
    assert written["searched_up_to"] == 4096
    assert [size["largest_batch"] for size in written["sizes"]] == [4096, 12, 0]


def test_a_batch_that_was_asked_for_has_its_own_estimate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = load_recipe("demo", ["model.backbone=test_resnet", "model.head_channels=16"])
    workloads = [Workload(recipe, (64, 64), 5, "training")]
    limits = estimate_limits(workloads, "cpu", bfloat16=False, limit=MIB)
    expected = estimate_peak_bytes(workloads[0], "cpu", bfloat16=False)
    assert limits_as_json(limits, MIB, "cpu")["sizes"][0]["batch_MiB"] == expected / MIB
    print_limits(limits, MIB, "cpu")
    head, row = capsys.readouterr().out.splitlines()[-2:]
    assert head.rstrip().endswith("5 pictures MiB")
    assert row.split()[-1] == f"{expected / MIB:.0f}"
