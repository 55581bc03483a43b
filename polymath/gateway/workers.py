"""Several processes behind one address: each a whole gateway, which share a Redis."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from typing import Any

from polymath.errors import ConfigError
from polymath.gateway.config import ConfigFile, load_config
from polymath.gateway.metrics import MULTIPROCESS
from polymath.gateway.prepare import Prepared, prepare

__all__ = ["Workers"]

logger = logging.getLogger(__name__)

Run = Callable[[Prepared, socket.socket], None]

SHORT_LIFE = 5.0
"""Seconds; a worker that ends sooner has something wrong that a new one would have, too."""
KILL_AFTER = 5.0
"""Seconds beyond the grace that running answers get."""


class Workers:
    """Starts the processes, starts new ones for those that die, hands signals on.

    Args:
        listener: the socket that all of them accept connections of.
        run: serves until it is told to stop; importable, since the processes are new ones.
    """

    def __init__(self, prepared: Prepared, listener: socket.socket, run: Run) -> None:
        self._config = prepared.config
        self._server = prepared.settings.server
        self._listener = listener
        self._run = run
        self._processes: dict[SpawnProcess, float] = {}
        self._stopping = False

    def serve(self) -> None:
        """Run until SIGINT or SIGTERM.

        Raises:
            ConfigError: a worker cannot start.
        """
        with tempfile.TemporaryDirectory(prefix="polymath-metrics-") as folder:
            os.environ[MULTIPROCESS] = folder
            for name in (signal.SIGTERM, signal.SIGINT):
                signal.signal(name, self._stop)
            signal.signal(signal.SIGHUP, self._reload)
            for _ in range(self._server.workers):
                self._start()
            try:
                self._watch()
            finally:
                self._end()

    def _start(self) -> None:
        process = get_context("spawn").Process(
            target=_work, args=(self._config, self._listener, self._run)
        )
        process.start()
        self._processes[process] = time.monotonic()

    def _watch(self) -> None:
        while not self._stopping:
            sentinels = [process.sentinel for process in self._processes]
            connection.wait(sentinels, timeout=1)
            for process, started in list(self._processes.items()):
                if process.is_alive() or self._stopping:
                    continue
                del self._processes[process]
                if time.monotonic() - started < SHORT_LIFE:
                    raise ConfigError(["a worker ended as soon as it was started; see its message"])
                logger.error("worker %s is gone; another one starts", process.pid)
                self._start()

    def _end(self) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + self._server.shutdown_grace + KILL_AFTER
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True

    def _reload(self, number: int, frame: Any) -> None:
        """One reloads, and the others follow it by the store."""
        for process in self._processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGHUP)
                return


def _work(config: ConfigFile, listener: socket.socket, run: Run) -> None:
    """One worker."""
    run(_prepared(config), listener)


def _prepared(config: ConfigFile) -> Prepared:
    """With the file as it is now, or if that cannot be used as it was when the server started."""
    try:
        file = load_config(config.path, changes=config.changes)
        server = {"server": config.settings.server}
        return prepare(replace(file, settings=file.settings.model_copy(update=server)))
    except ConfigError as error:
        logger.error("the config is as it was: %s", error.message)
        return prepare(config)
