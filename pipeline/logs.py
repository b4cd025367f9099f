"""Log lines say what they belong to: round, shard, request. How they look, and where they go, is Ray's.

log = logger(__name__)
with about(round=plan.round_id):
    log.info("…")          # with `observe.logs: json` the line has "round"; so have those of everything called here
"""

import logging
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

_ids: ContextVar[Mapping[str, str]] = ContextVar("wiseline_ids", default=MappingProxyType({}))


@contextmanager
def about(**of: str) -> Iterator[None]:
    """What is logged inside this block, in this thread or task, belongs to these ids too."""
    token = _ids.set({**_ids.get(), **of})
    try:
        yield
    finally:
        _ids.reset(token)


def ids() -> dict[str, str]:
    """What is logged here belongs to; to be handed on to another process or thread."""
    return dict(_ids.get())


def logger(name: str) -> "logging.LoggerAdapter[logging.Logger]":
    return _WithIds(logging.getLogger(name), {})


class _WithIds(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, {**kwargs, "extra": {**_ids.get(), **kwargs.get("extra", {})}}
