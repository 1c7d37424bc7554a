import asyncio
import io
import json
import socket
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.websockets import WebSocketDisconnect

import danet
from danet.errors import UserError
from danet.evaluation.inference import predict_classes
from danet.inspection import Inspection
from danet.web import actions
from danet.web.server import build_application, serve
from danet.web.sessions import Limits, NotKeptError, Sessions
from networks import tiny_danet

LIMITS = Limits(megabytes=1, megapixels=1, waiting=1, pictures=2)


@pytest.fixture(scope="module")
def predictor() -> danet.Predictor:
    model = tiny_danet(4)
    return danet.Predictor(model, device="cpu", precision="fp32")


@pytest.fixture
def sessions(predictor: danet.Predictor) -> Sessions:
    return Sessions(predictor, LIMITS)


@pytest.fixture
def client(sessions: Sessions) -> Iterator[TestClient]:
    with TestClient(
        build_application(sessions, ["streets.example"]), base_url="http://127.0.0.1"
    ) as client:
        yield client


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def send(client: TestClient, content: bytes) -> dict:
    answer = client.post("/api/segment", files={"image": ("a.png", content)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_picture_is_segmented_as_the_predictor_does(
    client: TestClient, predictor: danet.Predictor
) -> None:
    image = picture()
    expected = predictor(image).classes
    found = send(client, png(image))
    assert (found["width"], found["height"]) == (60, 40)
    shares = {entry["id"]: entry["share"] for entry in found["classes"]}
    for index in range(4):
        assert shares.get(index, 0) == pytest.approx((expected == index).mean())
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    path = f"/api/pictures/{found['id']}"
    mask = Image.open(io.BytesIO(client.get(f"{path}/mask.png").content))
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.asarray(mask), expected)
    pixel = client.get(f"{path}/pixel", params={"x": 59, "y": 3}).json()
    assert pixel["class_id"] == expected[3, 59]
    assert 0.25 <= pixel["probability"] <= 1


def test_branches_have_masks_of_their_own(client: TestClient, predictor: danet.Predictor) -> None:
    image = picture(seed=3)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    branches = ("position", "channel")
    expected = predict_classes(predictor.model, pixels, predictor.test, branches)
    path = f"/api/pictures/{send(client, png(image))['id']}"
    for branch, classes in zip(branches, expected, strict=True):
        mask = client.get(f"{path}/mask.png", params={"branch": branch}).content
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(mask))), classes.numpy())


def test_pictures_of_attention_and_classes(client: TestClient) -> None:
    image = Image.new("RGB", (64, 64), (200, 120, 40))
    path = f"/api/pictures/{send(client, png(image))['id']}"
    for question in ("attention.jpg?x=5&y=9", "overlay.jpg?opacity=0.3&branch=channel"):
        answer = client.get(f"{path}/{question}")
        assert answer.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
    clear = Image.open(io.BytesIO(client.get(f"{path}/overlay.jpg?opacity=0").content))
    assert np.abs(np.asarray(clear).astype(int) - np.asarray(image)).max() < 6


def test_model_is_described(client: TestClient) -> None:
    facts = client.get("/api/model").json()
    assert facts["classes"] == ["class 0", "class 1", "class 2", "class 3"]
    assert facts["branches"] == ["fused", "position", "channel"]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("pixel?x=60&y=0", 400, "outside the picture"),
        ("pixel?x=-1&y=0", 422, "greater than or equal"),
        ("attention.jpg?x=1&y=40", 400, "outside the picture"),
        ("mask.png?branch=lower", 400, "fused, position, channel"),
        ("overlay.jpg?opacity=2", 422, "less than or equal"),
    ],
)
def test_wrong_questions(client: TestClient, path: str, status: int, message: str) -> None:
    answer = client.get(f"/api/pictures/{send(client, png(picture()))['id']}/{path}")
    assert answer.status_code == status
    assert message in answer.text


def test_a_picture_too_wide_for_a_jpeg_file(client: TestClient) -> None:
    wide = Image.new("RGB", (65_501, 1))
    picture_id = send(client, png(wide))["id"]
    for path in ("overlay.jpg", "attention.jpg?x=1&y=0"):
        answer = client.get(f"/api/pictures/{picture_id}/{path}")
        assert answer.status_code == 400
        assert "65501x1 is too large for a JPEG file" in answer.text
    assert client.get(f"/api/pictures/{picture_id}/mask.png").status_code == 200


def test_what_is_no_picture_is_refused(client: TestClient) -> None:
    for content in (b"", b"no picture", png(picture())[:200]):
        answer = client.post("/api/segment", files={"image": ("a.png", content)})
        assert answer.status_code == 400
        assert "picture" in answer.json()["detail"]
        assert "Traceback" not in answer.text


def test_bombs_and_heavy_uploads_are_refused(client: TestClient) -> None:
    bomb = png(Image.new("L", (1001, 1000)))
    answer = client.post("/api/segment", files={"image": ("a.png", bomb)})
    assert answer.status_code == 413
    assert "1 million pixels" in answer.json()["detail"]
    heavy = b"0" * (2 << 20)
    answer = client.post("/api/segment", files={"image": ("a.png", heavy)})
    assert answer.status_code == 413
    # Without an announced length, and to the page's own upload as well.
    for path, count in {"/api/segment": 40, "/gradio_api/upload": 32 * 20}.items():
        pieces = (heavy[:65536] for _ in range(count))
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = client.post(path, content=pieces, headers=headers)
        assert answer.status_code == 413, path


def test_an_upload_that_stands_still_is_ended(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danet.web.limits._SLOWEST_UPLOAD_SECONDS", 0.2)
    application = build_application(sessions, [])
    sent: list[dict] = []

    async def silence() -> dict:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def answer(message: dict) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/api/segment", "query_string": b""}
    scope |= {"headers": [*headers, (b"content-length", b"1000")], "http_version": "1.1"}
    asyncio.run(asyncio.wait_for(application(scope, silence, answer), 20))
    assert sent[0]["status"] == 413


def test_any_request_is_answered_as_the_description_says(predictor: danet.Predictor) -> None:
    """But for files, of which the description cannot say what is a picture."""
    application = build_application(Sessions(predictor, LIMITS), ["*"])
    api = schemathesis.openapi.from_asgi("/openapi.json", application)
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) == 6
    for operation in operations:

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def answers(case: schemathesis.Case) -> None:
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        answers()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "TRACE", "OPTIONS"])
def test_another_method_than_a_paths_own_is_not_allowed(client: TestClient, method: str) -> None:
    answer = client.request(method, "/api/model")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"
    assert answer.json() == {"detail": "Method Not Allowed"}
    assert client.request(method, "/api/nothing").status_code == 404


def test_pictures_that_do_not_fit_the_memory_are_refused(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*args: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    with monkeypatch.context() as patch:
        patch.setattr("danet.web.sessions.Inspection", runs_out)
        answer = client.post("/api/segment", files={"image": ("a.png", png(picture()))})
    assert answer.status_code == 413
    assert "too little memory" in answer.json()["detail"]
    assert send(client, png(picture()))["width"] == 60


def test_large_pictures_are_kept_for_less_long(predictor: danet.Predictor) -> None:
    sessions = Sessions(predictor, LIMITS._replace(pictures=9, kept_megapixels=1))
    names = [sessions.keep(sessions.inspect(png(picture(900, 600)))) for _ in range(3)]
    assert sessions.find(names[2]).image.width == 900
    with pytest.raises(NotKeptError):
        sessions.find(names[1])


def test_only_the_latest_pictures_are_kept(client: TestClient) -> None:
    ids = [send(client, png(picture(seed=seed)))["id"] for seed in range(3)]
    states = [client.get(f"/api/pictures/{name}/mask.png").status_code for name in ids]
    assert states == [404, 200, 200]
    assert client.get("/api/pictures/../../etc/passwd/mask.png").status_code == 404


def test_a_crowd_is_turned_away_not_piled_up(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, inside = threading.Event(), threading.Semaphore(0)
    real = Inspection.__init__

    def slow(*args: object, **kwargs: object) -> None:
        inside.release()
        assert gate.wait(30)
        real(*args, **kwargs)

    monkeypatch.setattr(Inspection, "__init__", slow)
    statuses: list[int] = []

    def post() -> None:
        answer = client.post("/api/segment", files={"image": ("a.png", png(picture()))})
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert inside.acquire(timeout=30)
    while len(statuses) < 4:
        assert any(thread.is_alive() for thread in threads)
        threads[0].join(0.01)
    gate.set()
    for thread in threads:
        thread.join()
    # One in the network and one waiting; the rest were told to come again.
    assert sorted(statuses) == [200, 200, 429, 429, 429, 429]


def test_pictures_of_visitors_who_left_are_not_segmented(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmented: list[object] = []
    monkeypatch.setattr("danet.web.sessions.Inspection", lambda *_, **__: segmented.append(1))
    free = threading.Event()
    sessions._network.submit(free.wait, 60)
    form = (
        b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        + png(picture())
        + b"\r\n--x--\r\n"
    )
    scope = {
        **{"type": "http", "method": "POST", "path": "/api/segment", "query_string": b""},
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"multipart/form-data; boundary=x"),
            (b"content-length", str(len(form)).encode()),
        ],
    }
    messages = [{"type": "http.request", "body": form, "more_body": False}]
    answered: list[dict] = []

    left = asyncio.Event()

    async def receive() -> dict:
        if messages:
            return messages.pop()
        left.set()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        answered.append(message)

    async def leave() -> None:
        application = build_application(sessions, [])
        asked = asyncio.create_task(application(scope, receive, send))
        await left.wait()
        await asyncio.sleep(0.2)  # until it is noted
        free.set()
        await asked

    asyncio.run(leave())
    assert not segmented
    assert answered[0]["status"] == 400


def test_malformed_bodies_are_refused(client: TestClient) -> None:
    bodies = (b"\xff\xfe", b"{", b"[" * 20_000, b"NaN", b"[-Infinity]", b'{"data": 1e999}')
    kinds = ("application/json", "multipart/form-data", "text/plain")
    for path, body, kind in product(("/api/segment", "/gradio_api/run/predict"), bodies, kinds):
        answer = client.post(path, content=body, headers={"content-type": kind})
        assert answer.status_code in (400, 422), (path, body[:9], kind)
        assert answer.json()["detail"]


def test_a_refused_visitor_may_finish_sending_and_gets_the_answer(sessions: Sessions) -> None:
    """A connection that is closed while something is still coming is reset."""
    sent: list[dict] = []
    left = [{"type": "http.request", "body": b"x", "more_body": True}] * 3
    left += [{"type": "http.request", "body": b"", "more_body": False}]
    left_when_done = []

    async def receive() -> dict:
        return left.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)
        left_when_done.append(len(left))

    headers = [(b"host", b"localhost"), (b"content-length", b"999999999")]
    scope = {"type": "http", "method": "POST", "path": "/api/segment", "headers": headers}
    asyncio.run(build_application(sessions, [])(scope, receive, send))
    assert sent[0]["status"] == 413
    assert [message.get("more_body", False) for message in sent[1:]] == [True, False]
    assert left_when_done == [4, 4, 0]


@pytest.mark.parametrize("listening", ["0.0.0.0", "[::]"])
def test_addresses_are_served_where_every_one_is_listened_on(
    sessions: Sessions, listening: str
) -> None:
    client = TestClient(build_application(sessions, [listening]))
    hosts = {"192.168.1.5:7860": 200, "[fe80::1]:7860": 200, "streets.example": 400}
    for host, status in hosts.items():
        assert client.get("/api/model", headers={"host": host}).status_code == status, host


def test_a_site_whose_name_ends_alike_is_another(client: TestClient) -> None:
    headers = {"origin": "http://evil-127.0.0.1", "host": "127.0.0.1"}
    assert client.get("/api/model", headers=headers).status_code == 403


def test_other_sites_and_hosts_are_refused(client: TestClient) -> None:
    for host, status in {
        "evil.example": 400,
        "": 400,
        "streets.example": 200,
        "Streets.example:443": 200,
        "localhost:7860": 200,
        "[::1]:7860": 200,
        "[::2]": 400,
    }.items():
        assert client.get("/api/model", headers={"host": host}).status_code == status, host
    assert client.get("/api/model", headers={"origin": "http://evil.example"}).status_code == 403
    own = {"origin": "http://127.0.0.1", "host": "127.0.0.1"}
    assert client.get("/api/model", headers=own).status_code == 200


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"host": "127.0.0.1", "origin": "http://evil.example"}]
)
def test_websockets_of_other_sites_and_hosts_are_closed(
    client: TestClient, headers: dict[str, str]
) -> None:
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        client.websocket_connect("/", headers=headers),
    ):
        pass
    assert closed.value.code == 1008


def test_no_file_of_the_machine_can_be_read(client: TestClient) -> None:
    for path in ("/etc/passwd", "../../../../etc/passwd", "pyproject.toml"):
        for route in ("/gradio_api/file=", "/file=", "/static/", "/"):
            answer = client.get(route + path)
            assert "root:" not in answer.text
            assert "[project]" not in answer.text


@pytest.mark.parametrize("action", ["segment", "segment_batch"])
def test_the_page_takes_only_files_that_were_uploaded(
    action: str, client: TestClient, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    picture().save(secret)
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    data = [file, 0.5] if action == "segment" else [[file]]
    config = client.get("/config").json()
    number = next(one["id"] for one in config["dependencies"] if one["api_name"] == action)
    call = {"data": data, "fn_index": number, "session_hash": "me"}
    assert client.post("/gradio_api/queue/join", json=call).status_code == 200
    answer = client.get("/gradio_api/queue/data", params={"session_hash": "me"})
    outcomes = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if "process_completed" in line
    ]
    assert [outcome["success"] for outcome in outcomes] == [False]
    assert "not uploaded by a user" in outcomes[0]["output"]["error"]


@pytest.mark.parametrize(
    ("host", "names", "message"),
    [
        ("nosuch.invalid", [], "is not an address of this machine"),
        ("192.0.2.1", [], "is not an address of this machine"),
        ("127.0.0.1", ["https://b.example"], "give the name alone"),
        ("127.0.0.1", ["b.example:8443"], "give the name alone"),
    ],
)
def test_wrong_hosts_are_told(
    host: str,
    names: list[str],
    message: str,
    predictor: danet.Predictor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve = socket.getaddrinfo

    def refuse(name: str, *arguments: object) -> object:
        if name.endswith(".invalid"):  # without asking anybody
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(name, *arguments)

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    with pytest.raises(UserError, match=message):
        serve(predictor, host, 0, LIMITS, names=names)


def test_the_page_needs_nothing_from_outside(client: TestClient) -> None:
    page = client.get("/").text
    assert "danet" in page
    for outside in ("fonts.googleapis", "cdn.", "cdnjs", "unpkg"):
        assert outside not in page, outside


@pytest.mark.parametrize(("more", "status"), [(0, 400), (100 << 10, 413)])
def test_a_file_may_be_as_large_as_is_said(more: int, status: int, client: TestClient) -> None:
    content = b"x" * ((LIMITS.megabytes << 20) + more)
    answer = client.post("/api/segment", files={"image": ("a.png", content)})
    assert answer.status_code == status


def test_each_file_of_a_batch_may_be_so_large(client: TestClient) -> None:
    files = [("files", (f"{index}.png", b"x" * 900_000)) for index in range(3)]
    assert client.post("/gradio_api/upload", files=files).status_code == 200


def test_json_is_small(predictor: danet.Predictor) -> None:
    application = build_application(Sessions(predictor, Limits()), [])
    with TestClient(application, base_url="http://127.0.0.1") as client:
        answer = client.post("/gradio_api/queue/join", content=b"[" + b" " * (5 << 20) + b"]")
    assert answer.status_code == 413
    assert "JSON may have 4 MB" in answer.text


def test_one_picture_is_kept_however_large(predictor: danet.Predictor) -> None:
    sessions = Sessions(predictor, Limits(kept_megapixels=0))
    assert sessions.find(sessions.keep(sessions.inspect(png(picture())))).image.width == 60


def test_pictures_that_are_asked_about_are_kept(sessions: Sessions) -> None:
    first, second = (sessions.keep(sessions.inspect(png(picture(seed=i)))) for i in range(2))
    sessions.find(first)
    sessions.keep(sessions.inspect(png(picture(seed=2))))
    assert sessions.find(first)
    with pytest.raises(NotKeptError):
        sessions.find(second)


def test_errors_do_not_tell_the_servers_folders(sessions: Sessions, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(gr.Error) as caught:
        actions.Actions(sessions).segment(str(tmp_path / "a.png"), 0.5)
    assert str(caught.value.message).startswith("a.png: ")
    rows, archive = actions.segment_batch(sessions, gr.File(), [str(tmp_path / "a.png")])
    assert archive is None
    assert rows[0][1].startswith("a.png: ")


def test_names_of_classes_are_no_html() -> None:
    model = tiny_danet(1)
    model.metadata = model.metadata.model_copy(update={"classes": ("<img src=x>",)})
    sessions = Sessions(danet.Predictor(model, device="cpu", precision="fp32"), LIMITS)
    legend = actions._legend(sessions.inspect(png(picture())))
    assert "&lt;img src=x&gt;" in legend
    assert "<img" not in legend
