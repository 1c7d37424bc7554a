"""Trains by a recipe for a given time, with all pictures in memory, and keeps the weights small.

    PYTHONPATH=src python benchmarks/gpu/train.py street_small_gpu --set data.root=DIR --minutes 6

The same steps as `danet train` takes, but every picture is read (or generated) once, by all cores,
and the data workers share them; and the number of steps is what a short run says the time allows.
Writes the recipe, metrics.jsonl and the weights in half precision to --out.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import shutil
import statistics
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset

from danet import DANet
from danet.data.loader import training_samples
from danet.data.spec import Sample
from danet.errors import TrainingStopped
from danet.recipes import load_recipe
from danet.training import loop
from danet.training.build import build_model
from danet.training.checkpoint import RunFolder, load_checkpoint, model_weights

RESERVE_SECONDS = 15
"""For starting the workers, validating and writing."""


def read(samples: Dataset[Sample], indices: list[int]) -> dict[int, Sample]:
    """Some of the pictures."""
    return {index: samples[index] for index in indices}


def in_memory(samples: Subset[Sample], processes: int) -> Subset[Sample]:
    """The same pictures, read by several processes."""
    needed = sorted(set(samples.indices))
    parts = [needed[start :: 8 * processes] for start in range(8 * processes)]
    found: dict[int, Sample] = {}
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for some in pool.map(functools.partial(read, samples.dataset), parts):
            found |= some
    return Subset(found, samples.indices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--trial-steps", type=int, default=150, help="of the short run")
    parser.add_argument("--run", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu/out")))
    args = parser.parse_args()
    start = time.monotonic()
    torch.backends.cudnn.benchmark = True
    config = load_recipe(args.recipe, args.set)
    spec, samples = training_samples(config.data)
    samples = in_memory(samples, os.cpu_count() or 1)
    loop.training_samples = lambda _: (spec, samples)
    print(f"{len(samples)} pictures in {time.monotonic() - start:.0f} s", flush=True)

    trial = RunFolder(args.run / "trial")
    shutil.rmtree(trial.path, ignore_errors=True)
    quick = config.train.model_copy(update={"steps": args.trial_steps, "validate_every": None})
    loop.train(config.model_copy(update={"train": quick}), trial.path)
    rates = [row["images_per_second"] for row in trial.read_metrics() if "loss" in row]
    rate = statistics.median(rates[len(rates) // 2 :])
    left = 60 * args.minutes - (time.monotonic() - start) - RESERVE_SECONDS
    steps = max(1, int(rate * left / config.train.batch_size))
    print(f"{rate:.0f} pictures a second; {steps} steps in {left:.0f} s", flush=True)

    run = RunFolder(args.run / "whole")
    shutil.rmtree(run.path, ignore_errors=True)
    settings = config.train.model_copy(update={"steps": steps})
    config = config.model_copy(update={"train": settings})
    try:
        loop.train(config, run.path)
    except TrainingStopped as error:
        print(error, flush=True)
    checkpoint = load_checkpoint(run.last)
    weights = model_weights(checkpoint)
    build_model(config, spec, weights, print).save_pretrained(args.out / "model", half=True)
    shutil.copy(run.recipe, args.out)
    shutil.copy(run.metrics, args.out)
    DANet.from_pretrained(args.out / "model")
    print(f"step {checkpoint['step']}; {time.monotonic() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
