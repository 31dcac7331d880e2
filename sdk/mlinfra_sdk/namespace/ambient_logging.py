"""The set-up of :mod:`logging` that a notebook makes: levels and plain handlers."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

# Loggers of the processes themselves.
_INFRASTRUCTURE = frozenset(
    {"asyncio", "ipykernel", "jupyter", "mlinfra", "mlinfra_sdk", "parso", "tornado", "traitlets"}
    | {"IPKernelApp", "Comm", "zmq"}
)

# Level, propagate and disabled of a logger (None: not told), and its handlers.
_Description = tuple[tuple[int, bool, bool] | None, list[Any]]


class LoggingState:
    """Levels of loggers and their handlers for the standard streams; or their file handlers.

    Handlers of libraries come with the libraries; only the levels of their loggers are state.
    Handlers of other classes, with filters or with their own formatters are left alone.
    """

    def __init__(self, files: bool) -> None:
        self._files = files
        self._unset: _Description = (None if files else (0, True, False), [])

    def get(self) -> dict[str, Any]:
        manager = logging.root.manager
        found: dict[str, _Description] = {"": self._describe(logging.root, "")}
        for name, logger in self._set_up(list(manager.loggerDict.items())):
            top = name.partition(".")[0]
            description = self._describe(logger, top)
            if description != self._unset and top not in _INFRASTRUCTURE:
                found[name] = description
        return {"disabled": manager.disable, "loggers": dict(sorted(found.items()))}

    def set(self, value: dict[str, Any]) -> None:
        logging.disable(value["disabled"])
        for name in self.get()["loggers"].keys() - value["loggers"].keys():
            self._apply(logging.getLogger(name), self._unset)
        for name, description in value["loggers"].items():
            self._apply(logging.getLogger(name or None), description)

    def _set_up(self, loggers: list[tuple[str, Any]]) -> list[tuple[str, logging.Logger]]:
        """Those that may have something to tell; there are hundreds, and they are asked for every
        cell."""
        loggers = [item for item in loggers if type(item[1]) is not logging.PlaceHolder]
        if self._files:
            return [item for item in loggers if item[1].handlers]
        return [
            (name, it)
            for name, it in loggers
            if it.handlers or it.level or it.disabled or not it.propagate
        ]

    def _describe(self, logger: logging.Logger, top: str) -> _Description:
        handlers = []
        if top not in sys.modules:
            states = map(self._handler_state, logger.handlers)
            handlers = [state for state in states if state is not None]
        settings = (logger.level, logger.propagate, logger.disabled)
        return (None if self._files else settings, handlers)

    def _apply(self, logger: logging.Logger, description: _Description) -> None:
        settings, handlers = description
        if settings is not None:
            level, logger.propagate, logger.disabled = settings
            if logger.level != level:
                logger.setLevel(level)
        wanted = list(handlers)
        for handler in list(logger.handlers):
            state = self._handler_state(handler)
            if state in wanted:
                wanted.remove(state)
            elif state is not None and logger.name.partition(".")[0] not in sys.modules:
                logger.removeHandler(handler)
                handler.close()
        for state in wanted:
            logger.addHandler(_handler(state))

    def _handler_state(self, handler: logging.Handler) -> Any:
        if handler.filters or type(handler.formatter) not in (type(None), logging.Formatter):
            return None
        if self._files and type(handler) is logging.FileHandler:
            target = ("file", os.path.abspath(handler.baseFilename), handler.encoding)
        elif not self._files and type(handler) is logging.StreamHandler:
            name = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}.get(id(handler.stream))
            if name is None:
                return None
            target = (name, "", None)
        else:
            return None
        return (target, handler.level, _formatter_state(handler.formatter))


stream_logging = LoggingState(files=False)
file_logging = LoggingState(files=True)


_STYLES = {logging.PercentStyle: "%", logging.StrFormatStyle: "{", logging.StringTemplateStyle: "$"}


def _formatter_state(formatter: logging.Formatter | None) -> Any:
    if formatter is None:
        return None
    return (formatter._fmt, formatter.datefmt, _STYLES[type(formatter._style)])


def _handler(state: Any) -> logging.Handler:
    (kind, path, encoding), level, form = state
    handler: logging.Handler
    if kind == "file":
        handler = logging.FileHandler(path, mode="a", encoding=encoding, delay=True)
    else:
        handler = logging.StreamHandler(getattr(sys, kind))
    handler.setLevel(level)
    if form is not None:
        handler.setFormatter(logging.Formatter(form[0], form[1], form[2]))
    return handler
