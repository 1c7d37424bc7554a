"""The page of `danet serve` under attack: is every request answered, and is it as fast afterwards?

Rounds of crowds, slow uploads, bombs, wrong files, huge bodies, paths that lead outside, malformed
JSON, other sites and visitors who go away, for as long as is asked; before and after them, uploads
one after another are timed.

python benchmarks/page_abuse.py street-small --minutes 20
"""

import argparse
import asyncio
import io
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import httpx
from results_file import add_results_option, commit, write_rows

from danet.bench.report import hardware
from danet.data.scenes import render

CROWD = 200
PATIENCE = 180
EXPECTED = {
    "crowd": {200, 429},
    "slow": {413, "closed"},
    "bomb": {413, 429},
    "wrong file": {400, 429},
    "huge": {413, "closed"},
    "outside": {400, 403, 404, 405},
    "malformed": {400, 404, 405, 413, 422},
    "other site": {400, 403},
    "left": {"closed"},
}


def jpeg(index: int) -> bytes:
    buffer = io.BytesIO()
    render(2, index)[0].save(buffer, "JPEG")
    return buffer.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A PNG of few bytes that says it has `side` squared pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side // 8 + 1) * 100)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


class Attack:
    """Requests against one server, and what became of each."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.host, self.port = re.fullmatch(r"http://(.+):(\d+)", address).groups()
        self.answers: dict[str, Counter[int | str]] = {kind: Counter() for kind in EXPECTED}
        self.seconds: list[float] = []
        self.photo = jpeg(3)
        limits = httpx.Limits(max_connections=CROWD)
        self.client = httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits)

    async def upload(self, kind: str, content: bytes, **headers: str) -> None:
        start = time.perf_counter()
        files = {"image": ("../../etc/passwd\x1b[31m.png", content)}
        try:
            answer = await self.client.post("/api/segment", files=files, headers=headers)
            self.answers[kind][answer.status_code] += 1
            if answer.status_code == 200:
                self.seconds.append(time.perf_counter() - start)
        except httpx.HTTPError as error:
            self.answers[kind][f"no answer: {type(error).__name__}"] += 1

    async def ask(self, kind: str, method: str, path: str, **options: object) -> None:
        try:
            answer = await self.client.request(method, path, **options)
            self.answers[kind][answer.status_code] += 1
        except httpx.HTTPError as error:
            self.answers[kind][f"no answer: {type(error).__name__}"] += 1

    async def send_slowly(self, kind: str, pieces: int, pause: float, announced: int) -> None:
        """A body in small pieces, which ends too early where `announced` is more."""
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        head = f"POST /api/segment HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {announced}\r\n"
        head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        head += '--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        answer = b""
        try:
            writer.write(head.encode())
            for _ in range(pieces):
                writer.write(b"-" * 1000)
                await writer.drain()
                await asyncio.sleep(pause)
            if kind != "left":
                answer = await asyncio.wait_for(reader.read(100), PATIENCE)
        except (ConnectionError, TimeoutError) as error:
            answer = b"" if isinstance(error, ConnectionError) else b"HTTP/1.1 no answer"
        finally:
            writer.close()
        found = answer.split()[1].decode() if answer else "closed"
        self.answers[kind][int(found) if found.isdecimal() else found] += 1

    async def round(self) -> None:
        """The crowd, and then all else at once."""
        outside = ("/api/pictures/..%2f..%2fetc%2fpasswd/mask.png", "/file=/etc/passwd")
        outside += ("/gradio_api/file=/etc/passwd", "/assets/../../../../etc/passwd")
        outside += ("/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",)
        malformed = (b"{", b"[" * 20_000, b'{"data": [null', b"\xff\xfe", b'{"data": 1e999}')
        await asyncio.gather(*(self.upload("crowd", self.photo) for _ in range(CROWD)))
        tasks = [self.upload("bomb", bomb()) for _ in range(10)]
        wrong = (b"", b"<svg/>", b"GIF89a", b"%PDF-1.4", self.photo[:500], b"\0" * 10_000)
        tasks += [self.upload("wrong file", content) for content in wrong * 3]
        tasks += [self.upload("huge", bytes(30 << 20)) for _ in range(3)]
        tasks += [self.ask("outside", "GET", path) for path in outside * 4]
        tasks += [
            self.ask("malformed", "POST", path, content=content, headers={"content-type": kind})
            for content in malformed
            for path in ("/api/segment", "/gradio_api/run/predict", "/gradio_api/queue/join")
            for kind in ("application/json", "multipart/form-data")
        ]
        tasks += [self.upload("other site", b"", origin="http://evil.example") for _ in range(5)]
        tasks += [self.upload("other site", b"", host="evil.example") for _ in range(5)]
        tasks += [self.send_slowly("slow", 70, 1.0, 100_000) for _ in range(10)]
        tasks += [self.send_slowly("left", 3, 0.1, 100_000) for _ in range(20)]
        await asyncio.gather(*tasks)

    async def one_after_another(self, count: int = 20) -> float:
        """The median seconds of an upload when nobody else is there."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            answer = await self.client.post("/api/segment", files={"image": ("a", self.photo)})
            assert answer.status_code == 200, answer.text
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def memory(process: int, key: str) -> float:
    """MiB, by a key of /proc/PID/status."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024


async def attack(address: str, process: int, minutes: float) -> dict[str, object]:
    attacker = Attack(address)
    await attacker.one_after_another(5)
    before = await attacker.one_after_another()
    resting, rounds = memory(process, "VmRSS"), 0
    peaks: list[float] = []
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        await attacker.round()
        rounds += 1
        peaks.append(memory(process, "VmHWM"))
    after = await attacker.one_after_another()
    await attacker.client.aclose()
    unexpected = 0
    for kind, counts in attacker.answers.items():
        print(f"{kind}: {dict(counts)}", flush=True)
        unexpected += sum(n for answer, n in counts.items() if answer not in EXPECTED[kind])
    attacker.seconds.sort()
    return {
        "minutes": minutes,
        "rounds": rounds,
        "requests": sum(counts.total() for counts in attacker.answers.values()),
        "unexpected_answers": unexpected,
        "segmented": len(attacker.seconds),
        "crowd_p50_s": round(statistics.median(attacker.seconds), 2),
        "crowd_p99_s": round(attacker.seconds[int(0.99 * (len(attacker.seconds) - 1))], 2),
        "alone_before_s": round(before, 3),
        "alone_after_s": round(after, 3),
        "resting_MiB": round(resting),
        "peak_after_first_round_MiB": round(peaks[0]),
        "peak_MiB": round(peaks[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_results_option(parser)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=60)
    args = parser.parse_args()
    command = [sys.executable, "-m", "danet", "serve", args.model, "--port", "0"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        address = re.search(r"http://127.0.0.1:\d+", server.stdout.readline())[0]
        try:
            found = asyncio.run(attack(address, server.pid, args.minutes))
        finally:
            server.terminate()
        server.wait()
        errors.seek(0)
        found["tracebacks"] = errors.read().count("Traceback")
        errors.seek(0)
        print(errors.read()[-2000:])
    row = {"model": args.model, **found, "hardware": hardware("cpu"), "commit": commit()}
    print(row)
    write_rows(args.results / "page_abuse.csv", [row])


if __name__ == "__main__":
    main()
