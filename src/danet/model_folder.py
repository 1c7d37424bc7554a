"""Model folders: `config.json` and `model.safetensors`, on disk or on the hub."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from danet.atomic import replacing
from danet.config import DataConfig, ModelConfig, Positive, Section, TestConfig
from danet.errors import UserError, explaining_lookup, first_line
from danet.palette import default_palette
from danet.validation_errors import validation_message

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
BEST_CHECKPOINT = "checkpoints/best.ckpt"
MODEL_FOLDER = "model"
"""A run folder's resolved recipe, what it logged, and its model."""
MAX_CLASSES = 255
"""Masks are 8 bit, and 255 is ignored."""

_NOT_ARCHITECTURE = {"pretrained_backbone", "backbone_weights", "init_from"}

Channel = Annotated[int, Field(ge=0, le=255)]
Palette = tuple[tuple[Channel, Channel, Channel], ...]


class Metadata(Section):
    """Everything that prediction needs besides the network and its weights."""

    classes: tuple[str, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    """Names in the order of their ids."""
    palette: Palette
    """One RGB colour per class."""
    mean: tuple[float, float, float] = DataConfig().mean
    """Subtracted from RGB in 0..255; the result is divided by `std`."""
    std: tuple[Positive, Positive, Positive] = DataConfig().std
    dataset: str | None = None
    """The data that the model was trained on, by `danet.data.open_dataset`'s name."""
    test: TestConfig = TestConfig()
    """The recipe's settings of inference."""

    @model_validator(mode="after")
    def _one_color_per_class(self) -> Self:
        if len(self.palette) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes but {len(self.palette)} colours")
        return self

    @classmethod
    def placeholder(cls, num_classes: int) -> Self:
        """Metadata of a network whose classes have no names."""
        names = tuple(f"class {index}" for index in range(num_classes))
        return cls(classes=names, palette=default_palette(num_classes))


class FolderConfig(Section):
    """The content of config.json."""

    format: Literal["danet"] = "danet"
    version: Literal[1] = 1
    model: ModelConfig
    metadata: Metadata


def write_folder(
    folder: Path, model: ModelConfig, metadata: Metadata, state: dict[str, Tensor], *, half: bool
) -> None:
    """Writes both files, each whole; the same content gives the same bytes.

    Args:
        half: store floating-point weights in half precision, but for tensors with values that it
            cannot hold.
    """
    config = FolderConfig(model=model, metadata=metadata)
    tree = config.model_dump(mode="json", exclude={"model": _NOT_ARCHITECTURE})
    text = json.dumps(tree, indent=2, ensure_ascii=False).encode() + b"\n"
    # Tied weights, as CoaT's, are written under each of their names, and safetensors wants copies.
    places = Counter(tensor.data_ptr() for tensor in state.values())
    apart = {
        name: tensor.clone() if places[tensor.data_ptr()] > 1 else tensor
        for name, tensor in state.items()
    }
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in apart.items()}
    if half:
        contiguous = {name: _halved(tensor) for name, tensor in contiguous.items()}
    with replacing(folder / WEIGHTS_FILE) as path:
        # Not save_file, which makes files that only their owner may read.
        path.write_bytes(save(contiguous, metadata={"format": "pt"}))
    with replacing(folder / CONFIG_FILE) as path:
        path.write_bytes(text)


def _halved(tensor: Tensor) -> Tensor:
    half = tensor.half() if tensor.is_floating_point() else tensor
    return half if half.isfinite().all() else tensor


def read_folder(folder: Path) -> tuple[FolderConfig, dict[str, Tensor]]:
    """Reads both files back; executes nothing.

    Raises:
        UserError: a file is missing or damaged, or the config is not one of this format.
    """
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    try:
        text = config_path.read_text(encoding="utf-8")
        state = load_file(weights_path)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is not a model folder: it needs {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{config_path}: not UTF-8 text ({error})") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{weights_path}: damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error})") from error
    try:
        return FolderConfig.model_validate(json.loads(text)), state
    except ValidationError as error:
        raise UserError(f"{config_path}: {validation_message(error, FolderConfig)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{config_path}: not valid JSON ({error})") from error


def misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What keeps tensors from being those of a network, `wanted`: one finding a tensor.

    Counters of batches seen may be missing: old checkpoints lack them, and nothing is computed
    with them.
    """
    needed = [name for name in wanted if not name.endswith("num_batches_tracked")]
    return [
        *(f"{name} is not in the network" for name in state if name not in wanted),
        *(f"{name} is missing" for name in needed if name not in state),
        *(
            f"{name} is {_shape(state[name])}, not {_shape(tensor)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ),
        *(
            f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, not floating point"
            for name, tensor in state.items()
            if name in wanted
            and wanted[name].is_floating_point()
            and not tensor.is_floating_point()
        ),
    ]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def files_of(model: str | Path) -> list[Path]:
    """The files that make up a model or a run as a command names it; not all need be there."""
    named = Path(model)
    names = (CONFIG_FILE, WEIGHTS_FILE, RECIPE_FILE, METRICS_FILE)
    folders = (named, named / MODEL_FOLDER)
    weights = [named.with_suffix(".bin")] if named.suffix else []  # of OpenVINO's
    return [
        named,
        *weights,
        *(place / name for place in folders for name in names),
    ]


def shipped_models() -> dict[str, Path]:
    """The models that ship with this package: name -> folder."""
    package = Path(__file__).parent
    # In a wheel, or beside src/ in a checkout.
    folders = (package / "models", package.parents[1] / "models")
    return {
        path.parent.name: path.parent
        for folder in folders
        for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))
    }


def locate(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: itself, a run's, one that comes along, or the hub's, fetched.

    Raises:
        UserError: neither a folder nor a repository that can be reached, or an unfinished run.
    """
    folder = Path(folder_or_hub_id)
    name = str(folder_or_hub_id)
    if not name:  # of an unset variable of a shell, say; Path("") is the working folder
        raise UserError("the model's name is empty; give a folder or a hub id")
    with explaining_lookup(f"model {name}"):
        if revision is not None and (folder.is_dir() or name in shipped_models()):
            raise UserError(f"model {name}: is local; only the hub's models have revisions")
        if (folder / RECIPE_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
            if not (folder / MODEL_FOLDER).is_dir():
                raise UserError(
                    f"{folder}: this run has no model yet; finish it with danet train "
                    f"{folder / RECIPE_FILE} --out {folder} --resume"
                )
            return folder / MODEL_FOLDER
        if folder.is_dir():
            return folder
        if folder.is_file():
            raise UserError(f"model {name}: is a file; give the folder of a model or a run")
    shipped = shipped_models()
    if name in shipped:
        return shipped[name]
    not_here = f"model {name}: no such folder"
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(
            f"{not_here}; give a model folder, a run folder, a hub id (OWNER/NAME), "
            f"or a model that comes with danet ({', '.join(shipped) or 'none'})"
        )
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE])
        )
    except HFValidationError as error:
        raise UserError(f"{not_here}, and it is not a valid hub id") from error
    # The hub's client raises its transport's many types.
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"{not_here}, and it could not be fetched from the hub ({reason}); check the name, or "
            "give a local folder"
        ) from error


def upload(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Uploads a model folder as one commit and returns its address.

    Raises:
        UserError: the hub cannot be reached, or refuses the name or the token.
    """
    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository.repo_id, folder_path=folder))
    except HFValidationError as error:
        raise UserError(f"{repo_id}: not a valid hub id; give OWNER/NAME") from error
    # The hub's client raises its transport's many types.
    except Exception as error:
        raise UserError(f"{repo_id}: could not be uploaded ({first_line(error)})") from error
