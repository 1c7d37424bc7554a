from pathlib import Path
from typing import get_args

import pytest

from danet.config import DataConfig, RunConfig, Section, differing_keys
from danet.errors import UserError
from danet.recipes import load_recipe, recipe_header, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_has_a_header(name: str) -> None:
    assert isinstance(load_recipe(name), RunConfig)
    header = recipe_header(name)
    assert header.title
    assert header.published
    assert header.measured


def test_every_setting_is_documented() -> None:
    for section in (*RunConfig.model_fields.values(), *DataConfig.model_fields.values()):
        kinds = [section.annotation, *get_args(section.annotation)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                for key, field in kind.model_fields.items():
                    assert field.description, f"{kind.__name__}.{key}"


def test_resolved_yaml_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    config = load_recipe("demo", ["train.steps=7", "data.crop_size=[64, 32]"])
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml())
    assert load_recipe(file) == config
    assert config.train.steps == 7
    assert config.data.crop_size == (64, 32)


def test_keys_that_differ_are_named() -> None:
    config = load_recipe("demo")
    assert differing_keys(config, load_recipe("demo")) == []
    other = load_recipe("demo", ["train.lr=0.5", "data.crop_size=[64, 32]"])
    assert differing_keys(config, other) == ["data.crop_size", "train.lr"]


def test_a_recipe_extends_another_and_states_what_differs(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: demo\ntrain: {steps: 5, lr: 0.5}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ntrain: {lr: 0.25}\n")
    config = load_recipe(tmp_path / "mine.yaml")
    assert (config.train.steps, config.train.lr) == (5, 0.25)
    assert config.model == load_recipe("demo").model


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.step=3"], "did you mean steps"),
        (["trian.steps=3"], "trian: unknown key; did you mean train"),
        (["train.steps=many"], "train.steps"),
        (["train.steps=0"], "train.steps"),
        (["train.class_weights=[0, 0]"], "class_weights are all 0"),
        (["train.lr=.nan"], "train.lr"),
        (["steps=3"], "SECTION.KEY=VALUE"),
        (["train.steps"], "SECTION.KEY=VALUE"),
        (["data.scale_range=[2, 1]"], "scale_range"),
        (["test.stride=[600, 600]"], "stride"),
        (["model.output_stride=4"], "output_stride"),
        (["train.steps=[1"], "not valid YAML"),
        (["data.extra=[{name: scenes, imges: 3}]"], r"extra\.0\.imges: .* did you mean images\?$"),
        (["data.crop_size=96x96"], r"crop_size: write a list in brackets, such as \[1, 2\]$"),
        (["data.crop_size=[96]"], "data.crop_size: has too few values$"),
        (["train.activation_checkpointing=x"], r"checkpointing: Input .* boolean.*, or .*'early'$"),
    ],
)
def test_wrong_settings_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("demo", overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "must be sections"),
        ("train: &a {steps: 3}\ndata: *a", "aliases"),
        ("train: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("extends: loop.yaml", "extends itself"),
        ("extends: ../{folder}/loop.yaml", "extends itself"),
        ("extends: nowhere", "no such recipe"),
        ("[" * 5000, "not valid YAML"),
        ("train: {steps: 3}\ndata: {name: scenes}\ntrain: {lr: 0.1}", "train appears twice"),
        ("train: 5", "train"),
    ],
)
def test_wrong_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").write_text(text.replace("{folder}", tmp_path.name))
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "loop.yaml")


@pytest.mark.parametrize(
    ("base", "mine", "override", "where"),
    [
        ("train: {stps: 3}", "train: {lr: 0.25}", "train.lr=0.5", "recipe BASE: train.stps: "),
        ("train: {lr: 3}", "train: {lr: -1}", "train.seed=0", "recipe MINE: train.lr: "),
        ("train: {lr: 3}", "train: {lr: 2}", "train.lr=-1", "--set train.lr=-1: train.lr: "),
        ("train: {lr: 3}", "trin: {lr: 2}", "train.lr=1", "recipe MINE: trin: unknown key"),
    ],
)
def test_mistakes_are_told_where_they_are(
    base: str, mine: str, override: str, where: str, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "mine.yaml").write_text(f"extends: base.yaml\n{mine}\n")
    where = where.replace("BASE", str(tmp_path / "base.yaml"))
    where = where.replace("MINE", str(tmp_path / "mine.yaml"))
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "mine.yaml", [override])
    assert str(caught.value).startswith(where)


def test_a_base_that_is_not_there_is_told_with_who_extends_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: demo.yaml")
    with pytest.raises(UserError, match=r"mine\.yaml: extends demo\.yaml: no such recipe or file"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("extends: [demo, scenes]")
    with pytest.raises(UserError, match="extends: must be one name or path"):
        load_recipe(tmp_path / "mine.yaml")


def test_numbers_are_decimal_or_say_their_base() -> None:
    """YAML 1.1 takes 010 for 8 and 1:30 for 90."""
    for text, steps in (("010", 10), ("1_000", 1000), ("0x10", 16)):
        assert load_recipe("demo", [f"train.steps={text}"]).train.steps == steps
    with pytest.raises(UserError, match=r"train\.seed"):
        load_recipe("demo", ["train.seed=1:30"])


def test_unknown_recipe_suggests_a_name() -> None:
    with pytest.raises(UserError, match="did you mean demo"):
        load_recipe("demoo")


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text('extends: "a\\0b"\n')
    with pytest.raises(UserError, match=r"cannot be read as text .*null byte"):
        load_recipe(tmp_path / "r.yaml")


def test_the_published_protocols() -> None:
    """As published, for one recipe of each kind."""
    config = load_recipe("cityscapes_r101_769x769_80k")
    assert config.model.backbone == "resnet101c"
    assert config.model.align_corners
    assert config.data.base_size == (2049, 1025)
    assert config.data.crop_size == (769, 769)
    assert (config.train.steps, config.train.batch_size) == (80_000, 8)
    assert (config.test.mode, config.test.window, config.test.stride) == (
        "slide",
        (769, 769),
        (513, 513),
    )
    wide = load_recipe("cityscapes_r50_512x1024_40k")
    assert wide.data.crop_size == (1024, 512)
    assert wide.model.backbone == "resnet50c"
    assert (wide.train.lr, wide.train.lr_min, wide.train.weight_decay) == (0.01, 1e-4, 5e-4)
    voc = load_recipe("voc_r50_512x512_20k")
    assert (voc.data.train_split, voc.train.batch_size) == ("train_aug", 16)
    assert voc.test.scale == (2048, 512)
    authors = load_recipe("cityscapes_r101_authors")
    assert authors.model.multi_grid == (4, 8, 16)
    assert (authors.train.lr, authors.train.head_lr_factor) == (0.003, 10)
    plain = load_recipe("paper_cityscapes_r50_fcn")
    assert not plain.model.position
    assert not plain.model.channel
    assert plain.model.multi_grid is None
    assert plain.data.scale_range == (1, 1)


@pytest.mark.parametrize("path", ["run #2", "2024", "my: set", "@x", "[a]"])
def test_paths_are_taken_as_they_stand(path: str) -> None:
    assert load_recipe("demo", [f"data.root={path}"]).data.root == Path(path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("train.steps", "true"), ("train.lr", "no"), ("train.class_weights", "[1, true]")],
)
def test_true_is_not_a_number(setting: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{setting}: true or false is not a valid value here"):
        load_recipe("demo", [f"{setting}={value}"])


def test_a_path_can_be_taken_back() -> None:
    for nothing in ("", "null"):
        assert load_recipe("demo", ["data.root=a", f"data.root={nothing}"]).data.root is None


def test_bases_are_not_offered_but_can_be_extended(tmp_path: Path) -> None:
    assert not any(name.startswith("_") for name in recipe_names())
    (tmp_path / "mine.yaml").write_text("extends: _ade20k_512x512\n")
    assert load_recipe(tmp_path / "mine.yaml").data.name == "ade20k"


def test_a_section_of_comments_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: demo\ntrain:\n  # steps: 3\n")
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe("demo")
