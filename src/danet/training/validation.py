"""Scores on validation pictures in the course of training."""

from collections.abc import Callable

from lightning_fabric import Fabric

from danet.config import RunConfig
from danet.data.spec import SegmentationDataset
from danet.devices import is_out_of_memory
from danet.errors import LogitsNotFinite, OutOfMemory, UserError
from danet.evaluation.evaluate import evaluate, segment_with
from danet.evaluation.metrics import Scores, scores
from danet.model import DANet
from danet.training.launch import holds_anywhere, reduce_over_processes


class Validation:
    """Scores networks on the first pictures of a split, of which each process segments its share.

    Args:
        pictures: the split.
    """

    def __init__(self, config: RunConfig, fabric: Fabric, pictures: SegmentationDataset) -> None:
        self.config = config
        self.fabric = fabric
        self.pictures = pictures

    @property
    def usual_count(self) -> int:
        """Pictures of the validations before the last step."""
        there = len(self.pictures)
        return min(there, self.config.train.validate_images or there)

    @property
    def grows_at_the_end(self) -> bool:
        """Whether the last one may be of more pictures."""
        return self.usual_count < len(self.pictures)

    def count(self, done: int) -> int:
        """Pictures of the validation after so many steps: at the end all, if the last are kept."""
        settings = self.config.train
        is_last = done == settings.steps and settings.keep == "last"
        return len(self.pictures) if is_last else self.usual_count

    def score(self, model: DANet, done: int, on_picture: Callable[[int], None]) -> Scores:
        """The scores after so many steps, which must be saved: this may take long.

        Args:
            model: whole, in every process.
            on_picture: called after each picture of this process with how many there are in all
                processes, about; may raise.

        Raises:
            LogitsNotFinite: in every process, if the logits of any picture were not finite.
            UserError: a picture or label cannot be read.
            OutOfMemory: a picture is too large.
        """
        fabric, config, count = self.fabric, self.config, self.count(done)
        scored = 0

        def count_picture() -> None:
            nonlocal scored
            scored += fabric.world_size
            on_picture(min(scored, count))

        diverged: LogitsNotFinite | None = None
        try:
            evaluation = evaluate(
                segment_with(model.eval(), config.test, config.train.precision),
                self.pictures,
                indices=range(fabric.global_rank, count, fabric.world_size),
                on_picture=count_picture,
            )
        except LogitsNotFinite as error:
            diverged = error
        except UserError as error:
            raise UserError(
                f"{error}; found in the validation after step {done}, which is saved: fix this, "
                "and continue with --resume"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"training: out of memory in the validation after step {done}, which is saved; set "
                "test.mode=slide, or lower test.batch_size or test.scale, and continue with "
                "--resume"
            ) from error
        # Not all processes have a picture that shows it.
        if holds_anywhere(fabric, diverged is not None):
            raise LogitsNotFinite(
                f"the network's logits were not finite in the validation after step {done}"
            ) from diverged
        confusion = evaluation.confusion["fused"].to(fabric.device)
        return scores(reduce_over_processes(fabric, confusion, "sum"))
