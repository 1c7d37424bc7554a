import pytest

from tiny_runs import FEW_SCENES


@pytest.fixture(autouse=True)
def small_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danet.data.catalog.scenes._LENGTHS", FEW_SCENES)
