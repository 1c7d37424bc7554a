"""The HTTP interface, for scripts. Its description is at /openapi.json."""

import asyncio
import threading
from collections.abc import Callable
from http import HTTPMethod, HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import Match

from danet.data.images import PictureTooLarge
from danet.segmentation import OVERLAY_OPACITY
from danet.web import drawings
from danet.web.sessions import BusyError, NotKeptError, Sessions

PREFIX = "/api"
_SECONDS_BETWEEN_LOOKS = 0.2
"""At a visitor who waits, for whether the connection is still there."""

Side = Annotated[int, Query(ge=0, le=1_000_000)]
Opacity = Annotated[float, Query(ge=0, le=1)]


class ModelFacts(BaseModel):
    """The model that is served."""

    backbone: str
    classes: list[str]
    palette: list[list[int]]
    """RGB colours in 0..255, in the classes' order."""
    branches: list[str]
    trained_on: str | None


class SegmentedPicture(BaseModel):
    """A picture that was segmented; `id` is for asking more about it."""

    id: str
    width: int
    height: int
    classes: list[drawings.ClassShare]
    disagreement: float
    """The part of the pixels on which the branches are not of one opinion."""


class PixelFacts(BaseModel):
    """The prediction for one pixel."""

    x: int
    y: int
    class_id: int
    class_name: str
    probability: float


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {
        "model": Problem,
        "description": "The file is not a picture, or a value does not fit it.",
    },
    413: {"model": Problem, "description": "The file or the picture is too large."},
    429: {"model": Problem, "description": "Too many others wait; try again in a moment."},
}
# Not by their model, which FastAPI would describe as pictures where the answer is one.
_PROBLEM = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
_OF_PICTURE: dict[int | str, dict[str, Any]] = {
    400: {"content": _PROBLEM, "description": "A value does not fit the picture or the model."},
    404: {"content": _PROBLEM, "description": "No such picture, or it is no longer kept."},
}


def router(sessions: Sessions) -> APIRouter:
    """The routes under /api."""
    api = APIRouter(prefix=PREFIX, tags=["danet"])

    @api.get("/model")
    def model() -> ModelFacts:
        """What the model is and which classes it knows."""
        network = sessions.predictor.model
        return ModelFacts(
            backbone=network.config.backbone,
            classes=list(network.metadata.classes),
            palette=[list(color) for color in network.metadata.palette],
            branches=list(network.branches),
            trained_on=network.metadata.dataset,
        )

    @api.post("/segment", responses=_REFUSALS)
    async def segment(request: Request, image: UploadFile) -> SegmentedPicture:
        """Segments an uploaded picture."""
        content = await image.read()
        gone = threading.Event()
        watch = asyncio.create_task(_note_leaving(request, gone))
        try:
            return await run_in_threadpool(_segmented, sessions, content, gone.is_set)
        finally:
            watch.cancel()

    @api.get("/pictures/{picture_id}/mask.png", responses=_OF_PICTURE, response_class=_Png)
    def mask(picture_id: str, branch: str = "fused") -> Response:
        """Class ids at the picture's size, as a palette PNG."""
        inspection = sessions.find(picture_id)
        chosen = drawings.check_branch(inspection, branch)
        return _Png(drawings.encode(inspection.segmentation(chosen).mask(), "PNG"))

    @api.get("/pictures/{picture_id}/overlay.jpg", responses=_OF_PICTURE, response_class=_Jpeg)
    def overlay(
        picture_id: str, branch: str = "fused", opacity: Opacity = OVERLAY_OPACITY
    ) -> Response:
        """The classes over the picture."""
        inspection = sessions.find(picture_id)
        chosen = drawings.check_branch(inspection, branch)
        drawn = drawings.overlay(inspection, chosen, opacity)
        return _Jpeg(drawings.encode(drawn, "JPEG"))

    @api.get("/pictures/{picture_id}/attention.jpg", responses=_OF_PICTURE, response_class=_Jpeg)
    def attention(picture_id: str, x: Side, y: Side) -> Response:
        """Where one pixel looks, over the grey picture."""
        inspection = sessions.find(picture_id)
        drawn = drawings.attention(inspection, (x, y))
        return _Jpeg(drawings.encode(drawn, "JPEG"))

    @api.get("/pictures/{picture_id}/pixel", responses=_OF_PICTURE)
    def pixel(picture_id: str, x: Side, y: Side) -> PixelFacts:
        """The class of one pixel and how sure the model is."""
        inspection = sessions.find(picture_id)
        score = inspection.score((x, y))
        name = inspection.metadata.classes[score.class_id]
        return PixelFacts(
            x=x, y=y, class_id=score.class_id, class_name=name, probability=score.probability
        )

    # The page is mounted at / and would answer whatever is left.
    @api.api_route("/{path:path}", methods=[*HTTPMethod], include_in_schema=False)
    def refuse(request: Request) -> None:
        allowed: set[str] = set()
        for route in api.routes:
            if isinstance(route, APIRoute) and route.matches(request.scope)[0] is Match.PARTIAL:
                allowed.update(route.methods or ())
        if allowed:
            allow = {"Allow": ", ".join(sorted(allowed))}
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers=allow)
        raise HTTPException(HTTPStatus.NOT_FOUND)

    return api


def _segmented(
    sessions: Sessions, content: bytes, has_gone: Callable[[], bool]
) -> SegmentedPicture:
    inspection = sessions.inspect(content, has_gone)
    return SegmentedPicture(
        id=sessions.keep(inspection),
        width=inspection.image.width,
        height=inspection.image.height,
        classes=drawings.class_shares(inspection),
        disagreement=float(inspection.disagreement.mean()),
    )


async def _note_leaving(request: Request, gone: threading.Event) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
    gone.set()


class _Png(Response):
    media_type = "image/png"


class _Jpeg(Response):
    media_type = "image/jpeg"


async def answer_user_error(_: Request, error: Exception) -> JSONResponse:
    """What was wrong with a question, a UserError, as an HTTP status."""
    statuses: dict[type[Exception], int]
    statuses = {NotKeptError: 404, PictureTooLarge: 413, BusyError: 429}
    status = statuses.get(type(error), 400)
    return JSONResponse({"detail": str(error)}, status)
