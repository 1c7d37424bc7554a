from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from danet.config import DataConfig, ExtraData
from danet.data import dataset_spec
from danet.data.loader import Cached, StepSampler, derive_seed, training_batches, training_samples
from danet.data.spec import DatasetSpec, Sample
from danet.errors import UserError

CONFIG = DataConfig(crop_size=(16, 12), scale_range=(0.8, 1.5), workers=0)


class Numbered:
    """Twelve pictures, each filled with its own index."""

    spec = DatasetSpec("numbered", ("a", "b"))
    broken: int | None = None

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise UserError(f"picture {index} is damaged")
        self.reads += 1
        image = Image.new("RGB", (20, 16), (index * 20,) * 3)
        return Sample(image, np.full((16, 20), index, np.uint8), str(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def batches(first: int = 0, steps: int = 6, seed: int = 0, **options) -> list:
    config = options.pop("config", CONFIG)
    dataset = options.pop("dataset", Numbered())
    sampler = StepSampler(first, steps, batch_size=4, **options)
    return list(training_batches(dataset, config, seed, sampler))


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


class Halves(Numbered):
    """Every picture's upper half is its own class, and its lower half class 12."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        sample.label[8:] = 12
        return sample


def test_class_mix_pastes_a_class_of_another_picture() -> None:
    options = {"scale_range": (1.0, 1.0), "crop_size": (20, 16), "photometric_distortion": False}
    config = CONFIG.model_copy(update={**options, "class_mix": 0.5})
    mixed = batches(config=config, dataset=Halves(), steps=30)
    assert_same(batches(config=config, dataset=Halves(), first=20, steps=30), mixed[20:])
    labels = torch.cat([batch.labels for batch in mixed])
    upper = [label[:8].unique().tolist() for label in labels]
    lower = [label[8:].unique().tolist() for label in labels]
    assert all(len(values) == 1 for values in upper + lower)
    # Half of the crops are mixed; half of these get the other's lower half, which is the same.
    own = batches(config=config.model_copy(update={"class_mix": 0.0}), dataset=Halves(), steps=30)
    changed = [
        not torch.equal(label, before)
        for label, before in zip(labels, torch.cat([b.labels for b in own]), strict=True)
    ]
    assert 15 <= sum(changed) <= 45  # of 120, a quarter, but one in twelve is its own partner


def test_batches_depend_on_seed_and_step_alone() -> None:
    everything = batches()
    assert_same(batches(), everything)
    assert_same(batches(first=4), everything[4:])
    assert not torch.equal(batches(seed=1)[0].images, everything[0].images)


def test_worker_processes_change_nothing() -> None:
    assert_same(batches(config=CONFIG.model_copy(update={"workers": 2})), batches())


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    batches()
    assert torch.equal(torch.rand(2), expected)


def test_an_epoch_shows_every_picture_once() -> None:
    shown = [int(label.unique()[0]) for batch in batches() for label in batch.labels]
    assert sorted(shown[:12]) == sorted(shown[12:]) == list(range(12))
    assert shown[:12] != shown[12:]


def test_processes_share_a_batch_without_repeats() -> None:
    whole = batches()
    halves = [batches(rank=rank, processes=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        joined = torch.cat([half[step].images for half in halves])
        assert torch.equal(joined, batch.images)


def test_cache_reads_each_picture_once() -> None:
    dataset = Numbered()
    assert_same(batches(dataset=Cached(dataset)), batches())
    assert dataset.reads == 12


def test_train_images_limits_the_pictures_and_extra_ones_follow_them() -> None:
    config = DataConfig(train_images=3, extra=(ExtraData(name="scenes", split="val", images=2),))
    spec, samples = training_samples(config)
    names = [f"train_{index:05}" for index in range(3)] + ["val_00000", "val_00001"]
    assert [sample.name for sample in samples] == names
    assert spec.name == "scenes"


def make_folder(root: Path) -> None:
    """One picture of two classes."""
    (root / "classes.txt").write_text("a\nb\n")
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True)
        Image.new("L", (4, 2)).save(root / kind / "train" / "0.png")


def test_extra_pictures_are_the_main_datasets_own_where_no_folder_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path)
    config = DataConfig(name="folder", root=tmp_path, extra=(ExtraData(name="folder", repeat=3),))
    _, samples = training_samples(config)
    assert [sample.name for sample in samples] == ["0"] * 4
    assert samples[0] is not samples[3]
    _, samples = training_samples(config.model_copy(update={"cache": True}))
    assert samples[0] is samples[3]


def test_extra_pictures_of_other_classes_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path)
    extra = ExtraData(name="folder", root=tmp_path)
    with pytest.raises(UserError, match=r"data.extra: folder has different classes from scenes"):
        training_samples(DataConfig(extra=(extra,)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_one_clear_error(workers: int) -> None:
    dataset = Numbered()
    dataset.broken = 7
    with pytest.raises(UserError, match=r"^picture 7 is damaged$"):
        batches(config=CONFIG.model_copy(update={"workers": workers}), dataset=dataset)


def test_derived_seeds_do_not_collide() -> None:
    seeds = {derive_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512


def test_as_many_classes_of_other_names_do_not_go_together(tmp_path: Path) -> None:
    count = dataset_spec("scenes").num_classes
    (tmp_path / "classes.txt").write_text("\n".join(f"class {index}" for index in range(count)))
    for kind, mode in (("images", "RGB"), ("labels", "L")):
        (tmp_path / kind / "train").mkdir(parents=True)
        Image.new(mode, (8, 8)).save(tmp_path / kind / "train/a.png")
    extra = ExtraData(name="folder", root=tmp_path)
    with pytest.raises(UserError, match="folder has different classes from scenes"):
        training_samples(DataConfig(name="scenes", extra=(extra,)))
