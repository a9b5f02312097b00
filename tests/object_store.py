"""A real S3 server on loopback, and a proxy before it that fails on request."""

import http.client
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_SIGNED = "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=s"


@dataclass
class Fault:
    """What becomes of the next requests whose address has `part` in it.

    Attributes:
        kind: "status 503", "drop" (the connection ends in the middle of the body), "lost" (it ends without an answer
            to a request that was done), or "slow" (nothing comes).
        left: of so many requests.
    """

    part: str
    kind: str
    left: int
    method: str = "GET"


@dataclass
class Server:
    """A server: its address, what it was asked for, and the faults to come."""

    url: str = ""
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, part: str, kind: str, times: int = 1_000_000, method: str = "GET") -> None:
        """Let requests fail."""
        self.faults.append(Fault(part, kind, times, method))

    def fault(self, method: str, path: str) -> str:
        """The fault of a request, empty for none."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.part in path and fault.left and fault.method == method:
                    fault.left -= 1
                    return fault.kind
        return ""


def proxy(target: str, server: Server) -> ThreadingHTTPServer:
    """A proxy before `host:port`, running in a thread; `shutdown` and `server_close` end it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = server.fault(self.command, self.path)
            if kind.startswith("status"):
                self.send_response(int(kind.split()[1]))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if kind == "slow":
                time.sleep(3)
            connection = http.client.HTTPConnection(target, timeout=30)
            headers = {"Authorization": _SIGNED, **dict(self.headers)}  # moto refuses strangers
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            data = response.read()
            if kind == "lost":
                self.close_connection = True
                connection.close()
                return
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            length = response.getheader("Content-Length") if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            with suppress(ConnectionError):  # who asked has gone
                self.wfile.write(data[: len(data) // 2] if kind == "drop" else data)
            if kind == "drop":
                self.close_connection = True
            connection.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    return httpd


class Bucket:
    """A new bucket of the server, `s3://photos`."""

    def __init__(self, server: Server) -> None:
        from obstore.store import from_url

        self.server = server
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        connection.request("PUT", "/photos", headers={"Content-Length": "0"})
        assert connection.getresponse().status == 200
        connection.close()
        self._store: Any = from_url("s3://photos", client_options={"allow_http": True})

    def put(self, key: str, data: bytes) -> None:
        """Write an object."""
        import obstore

        obstore.put(self._store, key, data)

    def put_all(self, folder: Path, prefix: str = "") -> None:
        """Write the files below a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(prefix + str(path.relative_to(folder)), path.read_bytes())

    def keys(self, prefix: str) -> list[str]:
        """The keys below a prefix, without it."""
        import obstore

        listed = [stored["path"] for chunk in obstore.list(self._store, prefix) for stored in chunk]
        return sorted(key.removeprefix(prefix) for key in listed)

    def get(self, key: str) -> bytes:
        """Read an object."""
        import obstore

        return bytes(obstore.get(self._store, key).bytes())

    def delete(self, key: str) -> None:
        """Remove an object."""
        import obstore

        obstore.delete(self._store, key)

    def table(self, prefix: str) -> dict[str, bytes]:
        """Names and bytes of the shards of a table."""
        names = [name for name in self.keys(f"{prefix}/") if name.endswith(".parquet") and "/" not in name]
        return {name: self.get(f"{prefix}/{name}") for name in names}
