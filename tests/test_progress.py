import pytest

from danet import progress
from danet.progress import ProgressReport


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_plain_lines_tell_first_and_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport("work", 4) as report:
        for step in range(4):
            report.advance(f"at {step}")
    printed = lines(capsys)
    assert printed[0].startswith("work 1/4  at 0")
    assert "left" in printed[0]
    assert printed[1:] == ["work 4/4  at 3"]


def test_lines_come_at_intervals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with ProgressReport("work", 3, done=1) as report:
        report.advance(steps=2)
        report.advance("checking", steps=0)
        report.say("note")
    assert lines(capsys) == ["work 3/3  ", "work 3/3  checking", "note"]


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport("work", 1, enabled=False) as report:
        report.advance()
        report.say("note")
    assert lines(capsys) == []


def test_more_steps_than_were_announced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with ProgressReport("work", 1) as report:
        report.advance()
        report.advance()
    assert lines(capsys) == ["work 1/1  ", "work 2/1  "]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_total_that_nobody_knows(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    with ProgressReport("work", None) as report:
        report.advance("at 0")
        report.advance("at 1")
    assert "left" not in (printed := capsys.readouterr().err)
    assert ("2/?" in printed) if terminal else (printed.splitlines() == ["work 1  at 0"])
