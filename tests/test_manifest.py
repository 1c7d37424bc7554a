from pathlib import Path

from danet.manifest import Manifest, Origin, finished_results
from segmented import ALONE, FIRST, SECOND

ORIGIN = Origin("/photos/p.jpg", 1, 2)


def test_the_later_line_of_a_result_counts_in_whichever_manifest_it_is(tmp_path: Path) -> None:
    for share, model, name in (
        (ALONE, "old", "x"),
        (FIRST, "new", "x"),
        (FIRST, "new", "y"),
        (ALONE, "old", "y"),
    ):
        with Manifest(tmp_path, share, model) as lines:
            lines.append(name, ORIGIN, {"mask": f"{name}.png"}, None)
    assert finished_results(tmp_path, "old") == {"y.png": ORIGIN}
    assert finished_results(tmp_path, "new") == {"x.png": ORIGIN}


def test_what_a_process_was_stopped_at_is_not_finished_when_another_ends(tmp_path: Path) -> None:
    """Even if the same model wrote it before."""
    results = {name: {"mask": f"{name}.png"} for name in "ab"}
    stopped, ended = (Manifest(tmp_path, share, "m") for share in (FIRST, SECOND))
    stopped.append("a", ORIGIN, results["a"], None)
    for lines, name in ((stopped, "a"), (ended, "b")):
        lines.begin([(name, ORIGIN, results[name])])
    ended.append("b", ORIGIN, results["b"], None)
    ended.__exit__(None)
    stopped.__exit__(KeyboardInterrupt)
    with Manifest(tmp_path, FIRST, "m"):
        assert finished_results(tmp_path, "m") == {"b.png": ORIGIN}
