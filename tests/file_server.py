"""A loopback server over a folder in PhysioNet's layout, with faults on demand."""

import contextlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """Serves `root`; `faults[path](handler, body)` answers in place of the file, `requested` logs the paths."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.requested: list[str] = []
        self.faults: dict[str, Callable] = {}

    def handle_error(self, request, client_address):
        pass  # a client that leaves early is part of the tests


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.lstrip("/")
        self.server.requested.append(path)
        file = self.server.root / path
        body = file.read_bytes() if file.is_file() else None
        self.server.faults.get(path, answer)(self, body)

    def log_message(self, *args):
        pass


def answer(handler, body: bytes | None) -> None:
    """Answers as a healthy server does."""
    if body is None:
        handler.send_error(404)
        return
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def cut(handler, body: bytes) -> None:
    """Announces the whole file, sends half and hangs up."""
    answer_length = len(body)
    handler.send_response(200)
    handler.send_header("Content-Length", str(answer_length))
    handler.end_headers()
    handler.wfile.write(body[: answer_length // 2])
    handler.close_connection = True


def trickle(seconds: int) -> Callable:
    """Announces a huge file, sends it slowly for a while and hangs up."""

    def fault(handler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**9))
        handler.end_headers()
        for _ in range(100 * seconds):
            handler.wfile.write(bytes(10_000))
            time.sleep(0.01)
        handler.close_connection = True

    return fault


def damage(handler, body: bytes) -> None:
    """Sends the file with one bit changed."""
    answer(handler, bytes([body[0] ^ 1]) + body[1:])


def after(count: int, fault: Callable, then: Callable = answer) -> Callable:
    """Commits one fault `count` times, then another."""
    calls = iter(range(count))
    return lambda handler, body: (fault if next(calls, None) is not None else then)(handler, body)


def status(code: int) -> Callable:
    """Answers with an HTTP status."""
    return lambda handler, body: handler.send_error(code)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Server]:
    """Runs a server in a thread."""
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
