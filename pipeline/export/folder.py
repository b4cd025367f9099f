"""The folder an export goes to: new or empty, and written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ConfigError


@contextmanager
def whole_folder(to: Path) -> Iterator[Path]:
    """A folder beside `to` that takes its place when the block ends, and is removed when the block raises.

    Raises ConfigError where `to` holds something already, or cannot be written.
    """
    to = to.absolute()
    if to.exists() and not to.is_dir():
        raise ConfigError(f"{to} is a file; name a folder that is new or empty.")
    if to.is_dir() and any(to.iterdir()):
        raise ConfigError(f"{to} is not empty; name a folder that is new or empty.")
    unfinished = to.with_name(f".{to.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.replace(to)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise ConfigError(f"{to} cannot be written ({reason}); put that right or name another folder.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
