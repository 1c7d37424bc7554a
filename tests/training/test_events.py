import threading
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from danet.training.events import Events


def test_metrics_are_scalars_of_their_step(tmp_path: Path) -> None:
    with Events(tmp_path, first_step=0) as events:
        events.write({"step": 3, "loss_fused": 0.5, "val/mIoU": 0.25})
    found = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(found.Tags()["scalars"]) == ["loss/fused", "val/mIoU"]
    assert [(e.step, e.value) for e in found.Scalars("val/mIoU")] == [(3, 0.25)]


def test_steps_after_the_checkpoint_are_hidden(tmp_path: Path) -> None:
    for first_step, steps in ((0, (1, 2, 3, 4)), (2, (3,))):
        with Events(tmp_path, first_step) as events:
            for step in steps:
                events.write({"step": step, "loss": 10 * first_step + step})
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in found] == [(1, 1), (2, 2), (3, 23)]


def test_only_tensorboards_thread_fails_in_silence(tmp_path: Path) -> None:
    """A full disk: the thread's error comes back from the next write, not as a traceback."""
    told: list[type[BaseException]] = []

    class Writer(threading.Thread):
        __module__ = "tensorboard.summary.writer.event_file_writer"

        def run(self) -> None:
            raise OSError

    before = threading.excepthook
    threading.excepthook = lambda failed: told.append(failed.exc_type)
    try:
        usual = threading.excepthook
        with Events(tmp_path, first_step=0):
            for thread in (Writer(), threading.Thread(target=lambda: int("x"))):
                thread.start()
                thread.join()
        assert threading.excepthook is usual
    finally:
        threading.excepthook = before
    assert told == [ValueError]
