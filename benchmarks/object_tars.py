"""Bytes that a job reads from an object store for tars, and its seconds: tars as a whole, and listed by their headers.

python benchmarks/object_tars.py --tars 4 --images 2000
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODEL = Path(__file__).parent.parent / "tests/goldens/aimv2-apple-native"
SETTINGS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
RUNS = {"listed by headers": ("--shard-size", "2048..20480"), "as a whole": ()}


class Counter:
    """Passes connections on to a server, and counts the bytes that come back."""

    def __init__(self, port: int) -> None:
        self.num_bytes = 0
        self._target = port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._socket.accept()
            far = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._pass, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                self.num_bytes += len(data) if counts else 0
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def tar_of(images: int, seed: int) -> bytes:
    """A tar of JPEGs of about 100 kB."""
    random, buffer = np.random.default_rng(seed), io.BytesIO()
    samples = []
    for _ in range(20):
        pixels = Image.fromarray(random.integers(0, 256, (280, 280, 3), dtype=np.uint8))
        pixels.save(encoded := io.BytesIO(), "JPEG", quality=92)
        samples.append(encoded.getvalue())
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(images):
            member = tarfile.TarInfo(f"{number:06}.jpg")
            member.size = len(data := samples[number % len(samples)])
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def serve(port: int) -> subprocess.Popen[bytes]:
    """moto's server, in a process of its own."""
    program = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for _ in range(200):
        with suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/tars", method="PUT"))
            return server
        time.sleep(0.1)
    raise TimeoutError("moto's server does not answer")


def run(title: str, options: tuple[str, ...], counter: Counter, out: Path) -> None:
    """Run the command; print the bytes read, when its sources were listed, when the first shard was there, and all."""
    command = [sys.executable, "-m", "nopad", "embed", "s3://tars", "--model", str(MODEL), "--out", str(out)]
    command += ["--max-patches", "16", "--device", "cpu", *options]
    before, start = counter.num_bytes, time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    listed = first = 0.0

    def watch() -> None:
        nonlocal first
        while process.poll() is None and not first:
            first = time.perf_counter() - start if any(out.glob("*.parquet")) else 0.0
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    assert process.stderr is not None
    for line in process.stderr:
        listed = listed or (time.perf_counter() - start if "loading the model" in line else 0.0)
    seconds = time.perf_counter() - start
    if process.wait():
        raise ChildProcessError(f"{title}: exit status {process.returncode}")
    megabytes = (counter.num_bytes - before) / 1e6
    print(f"{title:20}{megabytes:10,.0f} MB{listed:8.1f} s{first:8.1f} s{seconds:8.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tars", type=int, default=4)
    parser.add_argument("--images", type=int, default=2000, help="of a tar")
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = serve(port)
    try:
        counter = Counter(port)
        os.environ.update(
            {**SETTINGS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{counter.port}", "AWS_ALLOW_HTTP": "true"}
        )
        from obstore import put
        from obstore.store import from_url

        options: Any = {"allow_http": True}
        store, total = from_url("s3://tars", client_options=options), 0
        for number in range(arguments.tars):
            total += len(data := tar_of(arguments.images, number))
            put(store, f"{number:05}.tar", data, use_multipart=False)
        print(f"{arguments.tars} tars of {arguments.images:,} images, {total / 1e6:,.0f} MB")
        print(f"{'':20}{'read':>13}{'listed':>10}{'1st shard':>10}{'all':>10}")
        with tempfile.TemporaryDirectory() as folder:
            for title, options in RUNS.items():
                run(title, options, counter, Path(folder) / title)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
