"""A way to the gateway that drops streams as a tired router does: nothing arrives any more, and nobody is told."""

from __future__ import annotations

import contextlib
import socket
import threading


class Cable:
    """Forwards TCP connections to a port of this machine.

    Attributes:
        url: Where to connect.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._dropped: set[int] = set()
        self._streams: set[int] = set()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def drop_streams(self) -> None:
        """From now on nothing gets through on the connections that carry a stream of events."""
        self._dropped |= self._streams

    def end(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()

    def _start(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += (near, far)
                self._start(self._forward, near, far, far.fileno())
                self._start(self._forward, far, near, far.fileno())

    def _forward(self, source: socket.socket, target: socket.socket, name: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if b"text/event-stream;" in data:
                    self._streams.add(name)
                if name not in self._dropped:
                    target.sendall(data)
            if name not in self._dropped:
                target.shutdown(socket.SHUT_WR)
