"""Several processes behind one address: each a whole gateway, which share a Redis."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from typing import Any

from polymath.errors import ConfigError
from polymath.gateway.config import ConfigFile, load_config
from polymath.gateway.json_logs import set_up_logging
from polymath.gateway.metrics import MULTIPROCESS
from polymath.gateway.prepare import Prepared, prepare
from polymath.gateway.reload import as_started

__all__ = ["Workers"]

logger = logging.getLogger(__name__)

Run = Callable[[Prepared, socket.socket], None]

UNUSABLE = 2
"""How a worker ends that cannot start, after it has said why."""
PAUSE = 1.0
"""Seconds before another worker starts, so that one that cannot start is not tried all the time."""
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
        self._processes: dict[SpawnProcess, bool] = {}  # whether it is one of the first
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
            for _ in range(self._server.workers):
                self._start(first=True)
            try:
                self._watch()
            finally:
                self._end()

    def _start(self, *, first: bool) -> None:
        process = get_context("spawn").Process(
            target=_work, args=(self._config, self._listener, self._run)
        )
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, or a reload would end it
        process.start()
        signal.signal(signal.SIGHUP, self._reload)
        self._processes[process] = first

    def _watch(self) -> None:
        while not self._stopping:
            connection.wait([process.sentinel for process in self._processes], timeout=1)
            for process in [one for one in self._processes if not one.is_alive()]:
                if not self._stopping:
                    self._replace(process)

    def _replace(self, process: SpawnProcess) -> None:
        first = self._processes.pop(process)
        if first and process.exitcode == UNUSABLE:
            raise ConfigError(["a worker cannot start; see its message"])
        logger.error("worker %s is gone; another one starts", process.pid)
        time.sleep(PAUSE)
        self._start(first=False)

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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    server = config.settings.server
    set_up_logging(server.log_level, server.log_format)
    try:
        run(_prepared(config), listener)
    except ConfigError as error:
        for problem in error.problems:
            logger.error("%s", problem)
        sys.exit(UNUSABLE)
    except KeyboardInterrupt:  # which uvicorn raises again when it is done
        pass


def _end_with_parent() -> None:
    """Or else nobody would replace lost workers, and the address would stay taken."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _prepared(config: ConfigFile) -> Prepared:
    """With the file as it is now, or if that cannot be used as it was when the server started."""
    try:
        file = load_config(config.path, changes=config.changes)
        return prepare(as_started(file, config.settings))
    except ConfigError as error:
        logger.error("the config is as it was: %s", error.message)
        return prepare(config)
