"""Writes the tables in docs/*.md from benchmarks/results/*.csv: `make docs`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; the functions below, by their
names, make them. With --check nothing is written and the status is 1 where a page is out of date.
The status is 1 too where a recipe's header has another score than published.csv or scores.csv.
"""

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
RECIPES = DOCS.parent / "src" / "danet" / "recipes"
UNSURE = re.compile(r"^# (?:unconfirmed|unresolved): (.*)$", re.MULTILINE)
"""In a recipe's header."""
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rows_of(name: str) -> list[dict[str, str]]:
    """The rows of one results file."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table with these columns."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def recipes() -> str:
    """Every built-in recipe: what was published for it and what was measured here."""
    measured: dict[str, list[str]] = {}
    for row in rows_of("scores"):
        score = f"{100 * float(row['mIoU']):.2f} ({row['split']}, {row['steps']} steps"
        score += f", seed {row['seed']})" if row["seed"] != "0" else ")"
        measured.setdefault(row["recipe"], []).append(score)
    published = {row["recipe"]: row for row in rows_of("published")}
    cells = []
    for path in _recipe_files():
        name = path.stem
        unsure = UNSURE.search(path.read_text(encoding="utf-8"))
        row = published.get(name, dict.fromkeys(rows_of("published")[0], ""))
        scores = " / ".join(filter(None, (row["mIoU"], row["mIoU_multi_scale_flip"])))
        here = "; ".join(measured.get(name, ["not run"]))
        source = row["source"] or "ours"
        cells.append([f"`{name}`", scores or "-", source, unsure[1] if unsure else "", here])
    return markdown(["recipe", "published", "by", "unsure", "measured here"], cells)


def _recipe_files() -> list[Path]:
    return sorted(RECIPES.glob("[!_]*.yaml"))


def wrong_headers() -> list[str]:
    """The recipes whose headers' scores the results files do not have, with both."""
    measured: dict[str, dict[str, list[float]]] = {}
    for row in rows_of("scores"):
        by_steps = measured.setdefault(row["recipe"], {})
        by_steps.setdefault(row["steps"], []).append(100 * float(row["mIoU"]))
    published = {row["recipe"]: row for row in rows_of("published")}
    wrong = []
    for path in _recipe_files():
        name, header = path.stem, path.read_text(encoding="utf-8")
        row = published.get(name, {})
        expected = (row.get("mIoU", ""), row.get("mIoU_multi_scale_flip", ""))
        line = _header_line(header, "published")
        found = (_score(line, "mIoU {}"), _score(line, "{} multi-scale"))
        if found != expected:
            wrong.append(f"{name}: published {found}, published.csv {expected}")
        # A header gives the score of one run, or the mean of those with as many steps.
        known = measured.get(name, {}).values()
        scores = {f"{score:.2f}" for runs in known for score in (*runs, statistics.mean(runs))}
        score = _score(_header_line(header, "measured"), "mIoU {}")
        if score not in (scores or {""}):
            wrong.append(f"{name}: measured {score or 'nothing'}, scores.csv {sorted(scores)}")
    return wrong


def _header_line(header: str, fact: str) -> str:
    found = re.search(rf"^# {fact}:(.*)$", header, re.MULTILINE)
    return found[1] if found else ""


def _score(line: str, pattern: str) -> str:
    found = re.search(pattern.format(r"(\d+\.\d+)"), line)
    return found[1] if found else ""


def position_attention() -> str:
    """Time and memory of position attention against the forms that hold N x N."""
    by_case: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows_of("position_attention"):
        case = (row["positions"], row["dtype"], row["direction"], _processor(row))
        by_case.setdefault(case, {})[row["form"]] = row
    forms = ("danet", "authors", "mmsegmentation")
    cells = []
    for case, implementations in sorted(by_case.items(), key=lambda item: int(item[0][0])):
        rows = [implementations.get(form) for form in forms]
        figures = [f"{r['seconds']} s, {r['extra_MiB']} MiB" if r else "not run" for r in rows]
        ours = rows[0]
        assert ours is not None
        ratios = [_ratios(ours, row, "extra_MiB") for row in rows[1:] if row]
        cells.append([*case, *figures, "; ".join(ratios)])
    header = ["N", "dtype", "what", "on", "ours", "authors' form", "mmsegmentation's form"]
    return markdown([*header, "faster, memory"], cells)


def gpu_attention() -> str:
    """Every way to position attention on a GPU: time, rate and memory."""
    columns = ("candidate", "batch", "positions", "key_width", "channels", "direction")
    columns += ("milliseconds", "tflops", "extra_MiB")
    cells = [[row[column] for column in columns] for row in rows_of("gpu_attention")]
    header = ["way", "batch", "N", "key width", "value width", "what", "ms", "TFLOP/s"]
    return markdown([*header, "extra MiB"], cells)


def gpu_network() -> str:
    """The whole network on a GPU, in the forms that were run."""
    columns = ("commit", "mode", "batch", "size", "form", "milliseconds", "images_per_second")
    columns += ("peak_GiB",)
    cells = [[row[column] or "-" for column in columns] for row in rows_of("gpu_network")]
    return markdown(["run", "what", "batch", "size", "form", "ms", "images/s", "peak GiB"], cells)


def mmsegmentation() -> str:
    """Time and memory of prediction, training, evaluation and augmentation, side by side."""
    by_case: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows_of("mmsegmentation"):
        case = (row["task"], f"{row['width']}x{row['height']}", row["batch"], _processor(row))
        by_case.setdefault(case, []).append(row)
    cells = []
    for case, rows in by_case.items():
        rows.sort(key=lambda row: not row["form"].startswith("mmsegmentation"))
        peer = rows[0]
        for row in rows:
            figures = [row["form"], row["seconds"], row["peak_MiB"]]
            cells.append([*case, *figures, _ratios(row, peer, "peak_MiB")])
    header = ["task", "size", "batch", "on", "form", "seconds", "peak MiB"]
    return markdown([*header, "against the first row"], cells)


def logits_to_labels() -> str:
    """Time and memory of the way from logits to labels."""
    rows = rows_of("logits_to_labels")
    cells = [
        [
            ours["classes"],
            ours["logits"],
            *(f"{row['seconds']} s, {row['peak_MiB']} MiB" for row in (theirs, ours)),
            _ratios(ours, theirs, "peak_MiB"),
        ]
        for theirs, ours in zip(rows[::2], rows[1::2], strict=True)
    ]
    return markdown(["classes", "logits", "at full size", "ours", "faster, memory"], cells)


def timm_families() -> str:
    """What became of each timm family, and how many work."""
    rows = rows_of("timm_families")
    usable = [row for row in rows if row["result"] != "no feature maps"]
    works = [row for row in usable if row["result"] == "ok"]
    columns = ("family", "model", "parameters_M", "sizes", "result", "note")
    cells = [[row[column].replace("|", "/") for column in columns] for row in rows]
    header = ["family", "smallest network", "M parameters", "output stride 8", "result", "note"]
    share = f"{len(works)} of the {len(usable)} families with feature maps work"
    return f"{share} (timm {rows[0]['timm']}).\n\n" + markdown(header, cells)


def ablation() -> str:
    """Mean and spread of every variant, and the difference from the plain FCN seed by seed."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows_of("ablation"):
        seeds = scores.setdefault(row["data"], {}).setdefault(row["variant"], {})
        seeds[row["seed"]] = 100 * float(row["mIoU"])
    cells = []
    for data, variants in scores.items():
        for variant, seeds in variants.items():
            values = list(seeds.values())
            plain = variants["fcn"]
            gains = [value - plain[seed] for seed, value in seeds.items() if seed in plain]
            cells.append(
                [
                    data,
                    variant,
                    " / ".join(f"{value:.2f}" for value in values),
                    f"{statistics.mean(values):.2f}",
                    f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-",
                    "-" if variant == "fcn" else " / ".join(f"{gain:+.2f}" for gain in gains),
                ]
            )
    header = ["data", "variant", "mIoU by seed", "mean", "standard deviation", "against fcn"]
    return markdown(header, cells)


def ablation_classes() -> str:
    """IoU of every class, mean over seeds, and what both attentions change."""
    rows = rows_of("ablation")
    names = list(rows[0])
    classes = names[names.index("aAcc") + 1 :]
    cells = []
    for data in dict.fromkeys(row["data"] for row in rows):
        for variant in ("fcn", "position", "channel reference", "both"):
            chosen = [r for r in rows if (r["data"], r["variant"]) == (data, variant)]
            if chosen:
                means = (statistics.mean(100 * float(r[name]) for r in chosen) for name in classes)
                cells.append([data, variant, *(f"{mean:.1f}" for mean in means)])
    return markdown(["data", "variant", *classes], cells)


def street() -> str:
    """The shipped model's scores by protocol and class."""
    rows = rows_of("street")
    names = list(rows[0])
    scores = names[names.index("mIoU") : names.index("seconds_480x360")]
    cells = [
        [row["protocol"], *(f"{100 * float(row[name]):.1f}" for name in scores)] for row in rows
    ]
    return markdown(["protocol", *scores], cells)


def drives() -> str:
    """mIoU on each drive that was left out, mean over seeds, and against the recipe."""
    scores: dict[str, dict[str, list[float]]] = {}
    for row in rows_of("drives"):
        found = scores.setdefault(row["variant"], {}).setdefault(row["drive"], [])
        found.append(100 * float(row["mIoU"]))
    means = {
        variant: {drive: statistics.mean(values) for drive, values in by_drive.items()}
        for variant, by_drive in scores.items()
    }
    plain = means["recipe"]
    cells = []
    for variant, by_drive in means.items():
        figures = [
            f"{by_drive[drive]:.1f} ({by_drive[drive] - plain[drive]:+.1f})"
            if drive in by_drive
            else "not run"
            for drive in plain
        ]
        cells.append(
            [variant, *(figures if variant != "recipe" else (f.split()[0] for f in figures))]
        )
    return markdown(["variant", *(f"{drive} left out" for drive in plain)], cells)


def page() -> str:
    """How soon the page answers."""
    columns = ("what", "median_ms", "largest_ms", "runs", "hardware")
    return markdown(columns, ([row[column] for column in columns] for row in rows_of("page")))


def export() -> str:
    """What exported files cost and how they agree."""
    columns = ("model", "form", "width", "height", "file_MB", "difference", "same_class")
    columns += ("seconds", "peak_MiB")
    return markdown(columns, ([row[column] for column in columns] for row in rows_of("export")))


def video() -> str:
    """Frames a second."""
    columns = ("model", "form", "width", "height", "frames_per_second", "hardware")
    return markdown(columns, ([row[column] for column in columns] for row in rows_of("video")))


def _all_columns(name: str, *without: str) -> str:
    rows = rows_of(name)
    columns = [column for column in rows[0] if column not in (*without, "commit")]
    headings = (column.replace("_", " ") for column in columns)
    return markdown(headings, ([row[column] for column in columns] for row in rows))


def faults() -> str:
    """Kills, and what they did."""
    return _all_columns("faults")


def fuzz() -> str:
    """Damaged inputs, and what they did."""
    return _all_columns("fuzz")


def page_abuse() -> str:
    """The page under attack, one row a figure."""
    row = rows_of("page_abuse")[-1]
    figures = [(name.replace("_", " "), value) for name, value in row.items() if name != "commit"]
    return markdown(("figure", "value"), figures)


def soak() -> str:
    """Memory over half an hour of training."""
    return _all_columns("soak")


def _processor(row: dict[str, str]) -> str:
    """The maker and family of the processor, such as AMD EPYC; two cores go without saying."""
    name = row["hardware"].replace("(R)", "").replace(" Processor", "")
    return name.removeprefix("2 cores of ")


def _ratios(ours: dict[str, str], theirs: dict[str, str], memory: str) -> str:
    """How many times as fast, and the share of the memory."""
    speed = float(theirs["seconds"]) / float(ours["seconds"])
    share = float(ours[memory]) / float(theirs[memory])
    return f"{speed:.2f}x, {share:.2f}"


MAKERS = {
    maker.__name__: maker
    for maker in (
        recipes,
        position_attention,
        gpu_attention,
        gpu_network,
        mmsegmentation,
        logits_to_labels,
        timm_families,
        ablation,
        ablation_classes,
        street,
        drives,
        page,
        export,
        video,
        faults,
        fuzz,
        page_abuse,
        soak,
    )
}


def main() -> int:
    """Bring every page up to date, or say which is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, say what is stale")
    check = parser.parse_args().check
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        renewed = TABLE.sub(lambda match: match[1] + MAKERS[match[2]]() + match[3], text)
        if renewed != text:
            stale.append(page.name)
            if not check:
                page.write_text(renewed, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run make docs")
    wrong = wrong_headers()
    for problem in wrong:
        print(f"header of recipe {problem}")
    return int(bool(wrong or (check and stale)))


if __name__ == "__main__":
    sys.exit(main())
