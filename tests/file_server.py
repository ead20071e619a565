"""A small HTTP server of a folder that can be slow to understand, rude, or wrong."""

import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer:
    """Serves a folder; ``faults`` are used up by the requests for shards, one each.

    "500": an error of the server; "cut": the connection ends half-way; "flip": one bit is another;
    "403": access is denied.
    """

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.folder, self.ranges = folder, ranges
        self.faults: deque[str] = deque()
        self.requests: list[str] = []
        """Paths below the folder, as they were asked for."""
        self.sent = 0
        """Bytes of bodies."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FileServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        self.requests.append(name)
        path = self.folder / name
        if not path.is_file():
            request.send_error(404)
            return
        fault = self.faults.popleft() if self.faults and name.endswith(".tar") else ""
        if fault.isdigit():
            request.send_error(int(fault))
            return
        data = path.read_bytes()
        asked = request.headers.get("Range")
        if asked and self.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            body = data[int(first) : int(last) + 1]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            body = data
            request.send_response(200)
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault == "cut":
            body = body[: len(body) // 2]
            request.close_connection = True
        request.wfile.write(body)
        self.sent += len(body)

    def fetched(self, ending: str = ".tar") -> list[str]:
        """What was asked for with this ending, in order, each as often as it was."""
        return [name for name in self.requests if name.endswith(ending)]
