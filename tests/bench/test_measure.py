import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from danet.bench import measure as measuring
from danet.bench.measure import Form, measure
from danet.bench.workload import Workload
from danet.config import RunConfig

TINY = {"backbone": "test_resnet", "head_channels": 32, "key_channels": 8}
CONFIG = RunConfig.model_validate({"model": TINY})
FORM = Form("danet", bfloat16=False)


def test_a_form_that_runs_out_of_a_cpus_memory_is_no_error() -> None:
    """The pictures alone are 192 TiB, more than a process can address."""
    job = Workload(CONFIG, (65_536, 65_536), 4_096, "prediction")
    assert measure(job, [FORM], "cpu", rounds=2, repeats=1) == {"danet": None}


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(measuring, "ProcessPoolExecutor", lambda n, **_: ThreadPoolExecutor(n))
    monkeypatch.setattr(measuring, "_measure_once", fails)
    job = Workload(CONFIG, (64, 48), 1, "prediction")
    with pytest.raises(RuntimeError, match="primitive descriptor"):
        measure(job, [FORM], "cpu", rounds=1, repeats=1)


@pytest.mark.slow
def test_what_the_other_forms_took_is_told_where_one_ran_out_of_memory(tmp_path: Path) -> None:
    """N x N is 1 GiB at 1024x1024, and held more than once."""
    command = [sys.executable, "-c", LIMITED, "bench", "demo", "--size", "1024x1024", "--peer"]
    command += [f"--set=model.{key}={value}" for key, value in TINY.items()]
    command += ["--precision=fp32", "--rounds=1", "--repeats=1", f"--json={tmp_path / 'out.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("out of memory") == 1
    ours, peer = json.loads((tmp_path / "out.json").read_text())["results"][0]["forms"]
    assert ours["seconds"] > 0
    assert ours["peak_MiB"] > 0
    assert peer["form"] == "eager, N x N"
    assert peer["seconds"] is None


LIMITED = """
import resource
import danet.bench.report
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30,) * 2)
from danet.cli import main
main()
"""
