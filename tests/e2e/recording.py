"""A TCP proxy that keeps every byte it passes on, in both directions: the wire as an eavesdropper sees it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Recorder:
    """Everything that went over the wire so far."""

    def __init__(self) -> None:
        self.to_service = bytearray()
        self.to_client = bytearray()
        self.cut_after: int | None = None
        """Break every connection once this many bytes went to the service."""


@contextmanager
def recording_proxy(target: str) -> Iterator[tuple[str, Recorder]]:
    """Listen on a free port, pass everything on to ``target``, record it; yield the address and the record."""
    host, port = target.rsplit(":", 1)
    recorder = Recorder()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    stopped = threading.Event()
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, sink: socket.socket, record: bytearray, upstream: bool) -> None:
        try:
            while not stopped.is_set():
                try:
                    data = source.recv(65536)
                except TimeoutError:
                    continue
                if not data:
                    break
                record.extend(data)
                if upstream and recorder.cut_after is not None and len(record) > recorder.cut_after:
                    break
                sink.sendall(data)
        except OSError:
            return  # the other side hung up, which ends this direction too
        finally:
            for end in (source, sink):
                end.close()

    def accept() -> None:
        while not stopped.is_set():
            try:
                near, _ = listener.accept()
            except TimeoutError:
                continue
            far = socket.create_connection((host, int(port)))
            for end in (near, far):
                end.settimeout(0.2)
            for arguments in ((near, far, recorder.to_service, True), (far, near, recorder.to_client, False)):
                thread = threading.Thread(target=pump, args=arguments)
                thread.start()
                threads.append(thread)

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", recorder
    finally:
        stopped.set()
        acceptor.join()
        for thread in threads:
            thread.join()
        listener.close()
