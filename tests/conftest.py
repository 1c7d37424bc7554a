import os
from pathlib import Path

# Test inputs are small: threads would wait for each other, and several test processes for cores.
# Set before torch is imported, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from PIL import Image

from namespaces import NO_NAMESPACES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--forbid-skips",
        action="store_true",
        help="fail if a test was skipped for another reason than what this machine forbids",
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--forbid-skips") or reporter is None:
        return
    skipped = [
        report.nodeid
        for report in reporter.stats.get("skipped", ())
        if NO_NAMESPACES not in str(report.longrepr)
    ]
    if skipped and exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"skipped, which is forbidden here: {', '.join(skipped)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own folder: three scenes each for training and validation."""
    from danet.data import dataset_spec, open_dataset

    root = tmp_path_factory.mktemp("dataset")
    (root / "classes.txt").write_text("\n".join(dataset_spec("scenes").classes))
    for split in ("train", "val"):
        scenes = open_dataset("scenes", split=split)
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(3):
            scene = scenes[index]
            size = (96, 72)
            scene.image.resize(size).save(root / f"images/{split}/{index}.jpg")
            label = Image.fromarray(scene.label).resize(size, Image.Resampling.NEAREST)
            label.save(root / f"labels/{split}/{index}.png")
    return root
