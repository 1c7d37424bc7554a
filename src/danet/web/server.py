"""The server: the page at /, the HTTP interface under /api, limits around both."""

import errno
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence

# Before Gradio is imported, which would call home.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import uvicorn
from fastapi import FastAPI

from danet.errors import UserError
from danet.predict import Predictor
from danet.web.api import answer_user_error, router
from danet.web.limits import ReadableJson, SameOrigin, TrustedHosts, UploadLimit
from danet.web.page import CSS, THEME, build_page
from danet.web.sessions import Limits, Sessions

_LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]"]


def serve(
    predictor: Predictor,
    host: str,
    port: int,
    limits: Limits,
    *,
    names: Sequence[str] = (),
    open_browser: bool = False,
) -> None:
    """Serves until interrupted.

    Args:
        host: the address to listen on.
        port: 0 takes a free one.
        names: other hosts that requests may name, as behind a proxy; "*" for any.

    Raises:
        UserError: the address or the port cannot be had.
    """
    for name in names:
        if "/" in name or (":" in name and not name.startswith("[")):
            raise UserError(f"--host-name {name}: give the name alone, without https:// and port")
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    application = build_application(Sessions(predictor, limits), [shown, *names])
    print(
        f"danet serves on {address} (HTTP interface: {address}/openapi.json); Ctrl+C stops it",
        flush=True,
    )
    if open_browser:
        threading.Timer(1, webbrowser.open, [address]).start()
    settings = uvicorn.Config(
        application,
        log_level="warning",
        limit_concurrency=256,
        timeout_keep_alive=20,
        h11_max_incomplete_event_size=64 << 10,
    )
    if threading.current_thread() is threading.main_thread():
        # Uvicorn raises the signal again when it has ended, which else left temporary files behind.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    uvicorn.Server(settings).run(sockets=[listening])


def build_application(sessions: Sessions, names: Sequence[str]) -> FastAPI:
    """The page and the HTTP interface behind their limits.

    Args:
        names: hosts that requests may name besides this machine's own; "*" for any. Where one is
            "0.0.0.0" or "[::]", any address in digits may be.
    """
    application = FastAPI(title="danet", docs_url=None, redoc_url=None)
    application.include_router(router(sessions))
    application.add_exception_handler(UserError, answer_user_error)
    page = build_page(sessions)
    # Else Gradio opens any file that a request names: launch() sets this, mounting does not.
    page.has_launched = True
    gr.mount_gradio_app(
        application,
        page,
        path="/",
        theme=THEME,
        css=CSS,
        max_file_size=sessions.limits.megabytes << 20,
        show_error=True,
        ssr_mode=False,
        footer_links=[],
    )
    application.add_middleware(ReadableJson)
    application.add_middleware(UploadLimit, limits=sessions.limits)
    application.add_middleware(SameOrigin)
    application.add_middleware(TrustedHosts, names=[*names, *_LOCAL_HOSTS])
    return application


def _listen(host: str, port: int) -> socket.socket:
    try:
        socket.getaddrinfo(host, port)
        return socket.create_server((host, port), family=_family(host), backlog=256)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(
                f"--host {host}: is not an address of this machine ({error.strerror}); use "
                "127.0.0.1, or 0.0.0.0 for all of its addresses"
            ) from error
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port, "
            "or 0 for a free one"
        ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
