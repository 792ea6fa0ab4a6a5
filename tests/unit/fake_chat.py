"""An OpenAI-compatible chat endpoint on loopback whose answers a test makes up."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# body of the request -> status and reply: JSON's content, or bytes as they are
Answer = Callable[[dict[str, Any]], tuple[int, Any]]


def reply(text: str | None, **more: Any) -> dict[str, Any]:
    """What such an endpoint answers; more: other keys of its choice."""
    choice = {"message": {"role": "assistant", "content": text}, **more}
    return {"choices": [choice], "usage": {"completion_tokens": 5}}


def question(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


class FakeChat:
    """Keeps what it was asked, and how many requests were open at once."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def asked(self) -> list[str]:
        return [question(body) for body in self.bodies]

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def _handler(server: FakeChat) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                server.paths.append(self.path)
                server.open += 1
                server.most_open = max(server.most_open, server.open)
            try:
                status, content = server.answer(body)
            finally:
                with server.lock:
                    server.open -= 1
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                if status == 429:
                    self.send_header("retry-after", "0.01")
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client's time-out

        def log_message(self, *args: Any) -> None:
            pass

    return Handler
