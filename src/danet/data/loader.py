"""Training batches, a function of the seed and the step alone."""

import signal
from collections.abc import Iterator, Sized
from itertools import accumulate
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset
from torchvision import tv_tensors

from danet.config import DataConfig, ExtraData
from danet.data import open_dataset
from danet.data.spec import DatasetSpec, Sample
from danet.data.transforms import paste_classes, training_transform
from danet.errors import UserError

_ORDER, _AUGMENTATION = 0, 1


def derive_seed(*key: int) -> int:
    """A 64-bit seed; different keys give practically independent seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def training_samples(config: DataConfig) -> tuple[DatasetSpec, Subset[Sample]]:
    """The samples of one epoch of the recipe, and their classes.

    Raises:
        UserError: a dataset cannot be opened, or an extra dataset has different classes.
    """
    main = ExtraData(
        name=config.name, root=config.root, split=config.train_split, images=config.train_images
    )
    parts = (main, *config.extra)
    sources = [
        (part.name, part.root or (config.root if part.name == config.name else None), part.split)
        for part in parts
    ]
    opened = {source: open_dataset(*source, needs_labels=True) for source in dict.fromkeys(sources)}
    starts = dict(zip(opened, accumulate(map(len, opened.values()), initial=0), strict=False))
    spec = opened[sources[0]].spec
    shown: list[int] = []
    for part, source in zip(parts, sources, strict=True):
        if opened[source].spec.classes != spec.classes:
            raise UserError(
                f"data.extra: {part.name} has different classes from {config.name}; "
                "pictures can be added only where the classes agree"
            )
        length = len(opened[source])
        first = range(starts[source], starts[source] + min(length, part.images or length))
        shown += part.repeat * list(first)
    pictures: Dataset[Sample] = ConcatDataset(cast(list[Dataset[Sample]], list(opened.values())))
    return spec, Subset(Cached(pictures) if config.cache else pictures, shown)


class Cached(Dataset[Sample]):
    """Keeps each sample in the memory of the process that read it."""

    def __init__(self, pictures: Dataset[Sample]) -> None:
        self.pictures = pictures
        self._read: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(cast(Sized, self.pictures))

    def __getitem__(self, index: int) -> Sample:
        if index not in self._read:
            self._read[index] = self.pictures[index]
        return self._read[index]


class Batch(NamedTuple):
    """Normalised images, float32 B 3 H W, and train ids, uint8 B H W with 255 ignored."""

    images: Tensor
    labels: Tensor


class AugmentedSamples(Dataset[tuple[Tensor, Tensor] | UserError]):
    """The endless stream of augmented samples, addressed by position.

    Position p is sample p mod n of epoch p // n. The order of an epoch depends on (seed, epoch),
    the augmentation of a position on (seed, position).
    """

    def __init__(self, samples: Dataset[Sample], config: DataConfig, seed: int) -> None:
        self.samples = samples
        self.transform = training_transform(config)
        self.class_mix = config.class_mix
        self.seed = seed
        self.length = len(cast(Sized, samples))
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor] | UserError:
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            generator = np.random.default_rng(derive_seed(self.seed, _ORDER, epoch))
            self._order, self._epoch = generator.permutation(self.length), epoch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, _AUGMENTATION, position))
            try:
                crop = self._crop(int(self._order[offset]))
                if self.class_mix > 0 and torch.rand(()).item() < self.class_mix:
                    other = int(torch.randint(self.length, ()))
                    crop = paste_classes(*crop, *self._crop(other))
            # Returned, not raised: the loader would turn a worker's error into a traceback's text.
            except UserError as error:
                return error
        return crop

    def _crop(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self.samples[index]
        label = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(sample.label)))
        image, label = self.transform(sample.image, label)
        return image.as_subclass(Tensor), label.as_subclass(Tensor)


class StepSampler(Sampler[list[int]]):
    """For each step from `first_step` on, the positions of this process's share of the batch."""

    def __init__(
        self, first_step: int, steps: int, batch_size: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.first_step = first_step
        self.steps = steps
        self.batch_size = batch_size
        share = batch_size // processes
        self.share = range(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            yield [step * self.batch_size + offset for offset in self.share]


def _collate(samples: list[tuple[Tensor, Tensor] | UserError]) -> Batch | UserError:
    pairs = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        pairs.append(sample)
    images, labels = zip(*pairs, strict=True)
    return Batch(torch.stack(images), torch.stack(labels))


def training_batches(
    samples: Dataset[Sample], config: DataConfig, seed: int, sampler: StepSampler
) -> Iterator[Batch]:
    """Yields one batch per step of the sampler.

    Raises:
        UserError: a sample cannot be read.
    """
    loader: DataLoader[tuple[Tensor, Tensor] | UserError] = DataLoader(
        AugmentedSamples(samples, config, seed),
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=_collate,
        worker_init_fn=_leave_stopping_to_the_parent,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or starting the loader would draw from the global one
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _leave_stopping_to_the_parent(_: int) -> None:
    """Ignores SIGTERM and SIGINT in a worker.

    A scheduler's SIGTERM and a terminal's Ctrl-C reach all processes, but the last step of the
    parent still needs data.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
