"""What requests are refused before the page or the HTTP interface sees them: ASGI middleware."""

import asyncio
import contextlib
import ipaddress
import json
import math
import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danet.web.api import PREFIX
from danet.web.sessions import Limits

_SLOWEST_UPLOAD_SECONDS = 60
_SECONDS_TO_FINISH = 5
_LARGEST_JSON = 4 << 20
_POLICY_VIOLATION = 1008
"""The code with which a refused websocket is closed (RFC 6455, 7.4.1)."""
_PAGE_UPLOAD = "/gradio_api/upload"
_ANY_ADDRESS = {"0.0.0.0", "[::]"}  # noqa: S104 - names of hosts, not to bind to
"""Listening there is listening on every address of the machine."""


def _is_api(path: str) -> bool:
    """Whether the HTTP interface answers there, which takes no JSON."""
    return path.startswith(f"{PREFIX}/")


def _has_body(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS")


class TrustedHosts:
    """Refuses requests that name another host, as a page would whose name was bent to this machine.

    Starlette's own middleware does not know IPv6 addresses.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.application = app
        self.names = {name.lower() for name in names}
        # A page's name can be bent to this machine, an address cannot.
        self.any_address = not self.names.isdisjoint(_ANY_ADDRESS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and "*" not in self.names:
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
            if name not in self.names and not (self.any_address and _is_address(name)):
                detail = "this host is not served here; see --host-name"
                await _refuse(scope, receive, send, 400, detail)
                return
        await self.application(scope, receive, send)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


class SameOrigin:
    """Refuses what another site's page asks for in a visitor's browser."""

    def __init__(self, app: ASGIApp) -> None:
        self.application = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin", b"").decode("latin-1")
        host = headers.get(b"host", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            await _refuse(scope, receive, send, 403, "requests from other sites are refused")
            return
        await self.application(scope, receive, send)


class UploadLimit:
    """Refuses bodies that are too large, by their announced or their real size, or too slow."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.application = app
        self.limits = limits

    def _bytes(self, path: str) -> int:
        """What a body may have: a file, or the page's whole batch, whose files Gradio limits."""
        files = self.limits.batch if path == _PAGE_UPLOAD else 1
        # A form has some lines around each file.
        return files * ((self.limits.megabytes << 20) + (64 << 10))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _has_body(scope):
            await self.application(scope, receive, send)
            return
        allowed = self._bytes(scope["path"])
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > allowed:
            await self._refuse(scope, receive, send)
            return
        received = 0
        started = refused = complete = False
        deadline = time.monotonic() + _SLOWEST_UPLOAD_SECONDS

        async def counted() -> Message:
            nonlocal received, refused, complete
            if refused:
                return {"type": "http.disconnect"}
            late = False
            message: Message = {"type": "http.disconnect"}
            try:
                message = await asyncio.wait_for(
                    receive(), None if complete else max(deadline - time.monotonic(), 0.01)
                )
            except TimeoutError:
                late = True
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            if (received > allowed or late) and not started:
                refused = True
                await self._refuse(scope, receive, send)
                return {"type": "http.disconnect"}
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            if not refused:
                await send(message)

        try:
            await self.application(scope, counted, noted)
        # Whatever the application makes of a visitor who seems to have gone.
        except Exception:
            if not refused:
                raise

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        detail = f"uploads may have {self.limits.megabytes} MB and take a minute"
        await _refuse(scope, receive, send, 413, detail)


class ReadableJson:
    """Refuses JSON that cannot be read, on which Gradio's handlers would stumble."""

    def __init__(self, app: ASGIApp) -> None:
        self.application = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _has_body(scope) or scope["path"] == _PAGE_UPLOAD or _is_api(scope["path"]):
            await self.application(scope, receive, send)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > _LARGEST_JSON:
                detail = f"JSON may have {_LARGEST_JSON >> 20} MB"
                await _refuse(scope, receive if more else None, send, 413, detail)
                return
        try:
            json.loads(body or b"null", parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError):
            await _refuse(scope, None, send, 400, "the body is not valid JSON")
            return
        whole: Message = {"type": "http.request", "body": body, "more_body": False}
        pending = [whole]

        async def again() -> Message:
            return pending.pop() if pending else await receive()

        await self.application(scope, again, send)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a JSON number")
    return number


async def _refuse(
    scope: Scope, receive: Receive | None, send: Send, status: int, detail: str
) -> None:
    """Answers at once, then lets the visitor finish sending for a moment.

    A connection that is closed while something is still coming is reset, and the answer lost.
    A websocket is closed instead: ASGI allows no HTTP answer there.

    Args:
        receive: None where all has come.
    """
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": detail})
        return
    body = json.dumps({"detail": detail}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if receive is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SECONDS_TO_FINISH):
                while (await receive()).get("more_body", False):
                    pass
    await send({"type": "http.response.body", "body": b""})
