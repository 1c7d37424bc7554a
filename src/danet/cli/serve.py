"""danet serve."""

from typing import Annotated

import typer

from danet.cli.options import Device, Model, Precision, note_protocol
from danet.errors import UserError


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 7860,
    host_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name that visitors use, as behind a proxy."),
    ] = None,
    megabytes: Annotated[int, typer.Option(min=1, help="Largest upload, in MB.")] = 20,
    megapixels: Annotated[int, typer.Option(min=1, help="Largest picture, in megapixels.")] = 12,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Serve a web page that segments pictures and shows attention, and an HTTP interface."""
    from danet.predict import Predictor

    try:
        from danet.web.server import serve as serve_forever
    except ModuleNotFoundError as error:
        raise UserError(f"danet serve needs {error.name}: pip install 'danet[web]'") from error
    from danet.web.sessions import Limits

    if not host:
        raise UserError("--host is empty; name an address, such as 127.0.0.1")
    limits = Limits(megabytes=megabytes, megapixels=megapixels)
    predictor = Predictor(model, device, precision)
    note_protocol(predictor.test)
    serve_forever(predictor, host, port, limits, names=host_name or (), open_browser=open_browser)
