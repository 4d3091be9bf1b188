"""Runs an application on an address until a signal says to stop, and lets what was begun come to its end."""

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from hsai.allocator import return_freed_memory
from hsai.errors import InputError
from hsai.infer.service import Service
from hsai.serve.protocol import PatientProtocol

BACKLOG = 128

CLOSING_SECONDS = 5
"""For the last bytes of answers to leave, when requests have ended; a client that reads none of them gets no more."""

IDLE_SECONDS = 30
"""A connection stays open for between requests: longer than clients keep one (httpx, and so OpenAI's client, for 5), or
a request would now and then meet the end of its connection."""


def listen(host: str, port: int) -> socket.socket:
    """A socket for `run_server`; port 0 is any that is free.

    Raises:
      InputError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        fault = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"--host {host} --port {port}: {fault}; choose another address") from error


def name_address(listener: socket.socket) -> str:
    """The URL under which a socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    app: ASGIApp,
    service: Service,
    listener: socket.socket,
    *,
    drain_seconds: float,
    on_ready: Callable[[], None],
    on_stop: Callable[[], None],
) -> None:
    """Serves until SIGINT or SIGTERM, in the main thread; then drains.

    Draining takes no connection and no request any more. What the service has is answered, for `drain_seconds` or until
    another signal; the rest ends with an error.

    Args:
      app: the application.
      service: which answers for it.
      listener: of `listen`; it is closed at the end.
      drain_seconds: see above.
      on_ready: called when connections are answered.
      on_stop: called at the first signal.
    """
    server = HttpServer(app, drain_seconds, on_ready)

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def stop() -> None:
            seconds = 0.0 if server.should_exit else drain_seconds
            loop.call_later(seconds, server.end_requests)
            threading.Thread(target=service.drain, args=(seconds,)).start()
            if not server.should_exit:
                server.should_exit = True
                on_stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        await server.serve([listener])

    try:
        asyncio.run(run())
    finally:
        service.drain(0.0)
        gc.unfreeze()


class HttpServer(uvicorn.Server):
    """uvicorn's, whose signals are ours: it would raise them again when it has ended."""

    def __init__(self, app: ASGIApp, drain_seconds: float, on_ready: Callable[[], None]) -> None:
        """Calls `on_ready` when it answers, and gives connections a little longer than `drain_seconds`."""
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(drain_seconds) + CLOSING_SECONDS,
            timeout_keep_alive=IDLE_SECONDS,
        )
        super().__init__(config)
        self._on_ready = on_ready

    def end_requests(self) -> None:
        """Whatever is not answered yet gets an error: `generate.py` knows no other reason to be cancelled."""
        for task in self.server_state.tasks:
            task.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's. What was loaded until now stays: looking through its 170,000 objects for garbage would now and
        then hold all threads up for a seventh of a second."""
        await super().startup(sockets)
        gc.collect()
        gc.freeze()
        return_freed_memory(every=0)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves them alone."""
        yield
