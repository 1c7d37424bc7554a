"""Starting from another model's weights."""

from pathlib import Path

from danet.errors import UserError
from danet.model import DANet
from danet.model_folder import locate, read_folder


def initialize_from(model: DANet, source: Path) -> None:
    """Loads another model's weights, its classifiers only if it has the same classes.

    Raises:
        UserError: the networks differ in more than their classes.
    """
    stored, state = read_folder(locate(source))
    if stored.metadata.classes != model.metadata.classes:
        state = {name: tensor for name, tensor in state.items() if "classifier" not in name}
    wanted = model.state_dict()
    unfit = [
        name
        for name, tensor in state.items()
        if name not in wanted or wanted[name].shape != tensor.shape
    ]
    missing = [name for name in wanted if name not in state and "classifier" not in name]
    if unfit or missing:
        raise UserError(
            f"model.init_from: {source} is another network ({len(unfit)} tensors do not fit, "
            f"{len(missing)} are missing, first {(unfit + missing)[0]}); train the same model "
            "settings as its config.json"
        )
    model.load_state_dict(state, strict=False)
