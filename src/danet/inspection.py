"""One picture's pass through the network, kept so that any pixel can be asked about.

What attention looks at is a row of the N x N matrix: one product of a query with all keys. Queries
and keys stay in memory (N x 2 D numbers), the matrix is never made.

Shapes: C channels, D key width, K classes, h w the features, N = h w, H W the picture.
"""

import math
import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from danet.attention import ChannelAttention, PositionAttention, channel_affinities
from danet.devices import autocast
from danet.errors import UserError
from danet.evaluation.inference import pixels_of, views
from danet.evaluation.strips import most_likely_classes
from danet.heads import Branch
from danet.kernels.precision import without_autocast
from danet.predict import Predictor
from danet.segmentation import ImageSource, Segmentation, as_rgb

FloatMap = npt.NDArray[np.float32]
Point = tuple[int, int]
"""Column and row of a pixel of the upright picture, from its upper left corner."""

ATTENDED_CHANNELS = 5
_QUERY_BLOCK = 512

# A forward hook is seen by every thread that uses the network.
_hooked = threading.Lock()


class ChannelMap(NamedTuple):
    """A channel of the channel branch after attention.

    Attributes:
        channel: its number among the branch's, from 0.
        response: h w, the channel's map.
        strength: standard deviation of the response over the picture.
        selectivity: 0 where it attends to all channels alike, 1 where to a single one
            (1 - entropy / log C).
        attends_to: the channels that it gathers most from, with their shares.
        responds_to: the class on whose pixels the response is largest in the mean.
    """

    channel: int
    response: FloatMap
    strength: float
    selectivity: float
    attends_to: tuple[tuple[int, float], ...]
    responds_to: int


class PixelScore(NamedTuple):
    """The most likely class of one pixel and its softmax score in 0..1."""

    class_id: int
    probability: float


class Inspection:
    """The network's outputs and attention for one picture: at one scale, whole, not mirrored.

    Args:
        predictor: holds the network; its test scale is kept, its flips and windows are not.
        image: as `Predictor` takes it.
        keep_channels: keep what `channels` needs, 2 C N numbers.

    Attributes:
        image: upright RGB.
        branches: H W uint8 class ids of the fused prediction and of each branch's classifier.

    Raises:
        UserError: it is not a readable picture.
    """

    def __init__(
        self,
        predictor: Predictor,
        image: ImageSource,
        *,
        keep_channels: bool = True,
    ) -> None:
        self.image = as_rgb(image)
        self.metadata = predictor.metadata
        self._received: FloatMap | None = None
        self._receiving = threading.Lock()
        names = predictor.model.branches
        pixels = pixels_of(self.image).to(predictor.device)
        test = predictor.test.model_copy(
            update={"mode": "whole", "ratios": (1.0,), "ratios_of": "scale", "flip": False}
        )
        with (
            torch.inference_mode(),
            autocast(predictor.precision, predictor.device),
            _recording(predictor.model) as passes,
        ):
            self._logits = views(predictor.model, pixels.unsqueeze(0), test, names)[0][0]
            classes = most_likely_classes([self._logits]).cpu().numpy()
            self.branches: dict[Branch, npt.NDArray[np.uint8]] = dict(
                zip(names, classes, strict=True)
            )
            self._query_DN: Tensor | None = None
            self._key_DN: Tensor | None = None
            self._channels: _Pass | None = None
            for recorded in passes:
                if isinstance(recorded.module, PositionAttention):
                    self._keep_queries(recorded.module, recorded.features)
                elif keep_channels:
                    self._channels = recorded
                self._grid = recorded.features.shape[-2:]

    def _keep_queries(self, module: PositionAttention, features: Tensor) -> None:
        self._query_DN, self._key_DN = (
            projection(features).flatten(2)[0].float() for projection in (module.query, module.key)
        )

    def segmentation(self, branch: Branch = "fused") -> Segmentation:
        """A classifier's prediction."""
        return Segmentation(self.branches[branch], self.metadata.classes, self.metadata.palette)

    @property
    def disagreement(self) -> npt.NDArray[np.bool_]:
        """H W, where the fused prediction and the branches' are not all the same."""
        fused = self.branches["fused"]
        differs = np.zeros(fused.shape, dtype=np.bool_)
        for classes in self.branches.values():
            differs |= classes != fused
        return differs

    @property
    def has_position_attention(self) -> bool:
        """Whether the network has the branch that `attention` reads."""
        return self._query_DN is not None

    @torch.inference_mode()
    def score(self, point: Point) -> PixelScore:
        """The fused prediction of one pixel."""
        column, row = self.pixel(point)
        scores_K = self._logits.rows(row, row + 1)[0, :, 0, column].softmax(0)
        class_id = int(self.branches["fused"][row, column])
        return PixelScore(class_id, scores_K[class_id].item())

    @torch.inference_mode()
    def attention(self, point: Point) -> FloatMap:
        """h w shares, summing to 1, of the attention that the pixel's position pays to each.

        Row j of equation (1)'s matrix, j being the cell of the feature map that the pixel is in.

        Raises:
            UserError: the pixel is outside the picture, or there is no position attention.
        """
        column, row = self.pixel(point)
        query_DN, key_DN = self._position()
        height, width = self._grid
        cell = row * height // self.image.height * width + column * width // self.image.width
        with without_autocast(key_DN.device.type):
            return self._as_map((query_DN[:, cell] @ key_DN).softmax(0))

    @torch.inference_mode()
    def received_attention(self) -> FloatMap:
        """h w shares, summing to 1, of the attention that all positions together pay to each.

        Raises:
            UserError: there is no position attention.
        """
        query_DN, key_DN = self._position()
        with self._receiving, without_autocast(key_DN.device.type):
            if self._received is None:
                received_N = torch.zeros_like(key_DN[0])
                for some_DQ in torch.split(query_DN, _QUERY_BLOCK, dim=1):
                    received_N += (some_DQ.T @ key_DN).softmax(1).sum(0)
                self._received = self._as_map(received_N / received_N.numel())
        return self._received

    @torch.inference_mode()
    def channels(self) -> list[ChannelMap]:
        """Every channel of the channel branch, the strongest first; none without that branch."""
        if self._channels is None:
            return []
        module = self._channels.module
        assert isinstance(module, ChannelAttention)
        shares_CC = channel_affinities(self._channels.features.flatten(2), module.affinity)[0]
        response_CN = self._channels.output[0].flatten(1).float()
        strengths = response_CN.std(1, correction=0)
        entropies = torch.special.entr(shares_CC).sum(1) / math.log(max(len(shares_CC), 2))
        top = shares_CC.topk(min(ATTENDED_CHANNELS, len(shares_CC)))
        classes = self._mean_by_class(response_CN).argmax(1)
        return [
            ChannelMap(
                channel=index,
                response=self._as_map(response_CN[index]),
                strength=strengths[index].item(),
                selectivity=1 - entropies[index].item(),
                attends_to=tuple(
                    zip(top.indices[index].tolist(), top.values[index].tolist(), strict=True)
                ),
                responds_to=int(classes[index]),
            )
            for index in strengths.argsort(descending=True).tolist()
        ]

    def _mean_by_class(self, response_CN: Tensor) -> Tensor:
        """C K means over the cells whose centre is predicted as each class; -inf without any."""
        cells = classes_of_cells(self.branches["fused"], *self._grid)
        classes_N = torch.from_numpy(cells).long().flatten().to(response_CN.device)
        member_NK = torch.nn.functional.one_hot(classes_N, len(self.metadata.classes)).float()
        counts_K = member_NK.sum(0)
        means_CK = response_CN @ member_NK / counts_K
        return means_CK.masked_fill(counts_K == 0, -math.inf)

    def _position(self) -> tuple[Tensor, Tensor]:
        if self._query_DN is None or self._key_DN is None:
            raise UserError(
                "the model has no position attention to look at; choose one that has it"
            )
        return self._query_DN, self._key_DN

    def pixel(self, point: Point) -> Point:
        """The point in Python's own numbers.

        Raises:
            UserError: it is none of the picture's.
        """
        try:
            column, row = map(operator.index, point)
        except (TypeError, ValueError) as error:
            raise UserError(f"point {point}: give column and row in whole pixels") from error
        width, height = self.image.size
        if not (0 <= column < width and 0 <= row < height):
            raise UserError(
                f"point {column},{row} is outside the picture, which is {width}x{height}; "
                f"give X,Y from 0,0 (upper left) to {width - 1},{height - 1}"
            )
        return column, row

    def _as_map(self, values_N: Tensor) -> FloatMap:
        result: FloatMap = values_N.view(*self._grid).float().cpu().numpy()
        return result


def classes_of_cells(
    classes: npt.NDArray[np.uint8], height: int, width: int
) -> npt.NDArray[np.uint8]:
    """Class ids H W at the centres of a feature map's h w cells."""
    rows = (np.arange(height) * 2 + 1) * classes.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * classes.shape[1] // (2 * width)
    return classes[np.ix_(rows, columns)]


def share_by_class(
    attention: FloatMap, classes: npt.NDArray[np.uint8], count: int
) -> npt.NDArray[np.float64]:
    """The attention h w that falls on each of the classes H W; K shares summing to 1."""
    shares = np.zeros(count)
    np.add.at(shares, classes_of_cells(classes, *attention.shape), attention)
    return shares


class _Pass(NamedTuple):
    """Input and output of an attention module, each 1 C h w."""

    module: nn.Module
    features: Tensor
    output: Tensor


@contextmanager
def _recording(model: nn.Module) -> Iterator[list[_Pass]]:
    """Lists this thread's passes through the attention modules."""
    passes: list[_Pass] = []
    recorder = threading.get_ident()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Meanwhile another thread may segment another picture with the same network.
        if threading.get_ident() == recorder:
            passes.append(_Pass(module, inputs[0], output))

    # Compiled code passes over new hooks. The stance is the whole process's, hence inside the lock.
    with _hooked, torch.compiler.set_stance("force_eager"):
        handles = [
            module.register_forward_hook(note)
            for module in model.modules()
            if isinstance(module, PositionAttention | ChannelAttention)
        ]
        try:
            yield passes
        finally:
            for handle in handles:
                handle.remove()
