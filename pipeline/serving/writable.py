"""The store, once it has shown that it never overwrites: asked before the first write, not at every one."""

import threading

from pipeline.config import StoreSection
from pipeline.storage.object_store import ObjectStore, open_store


class WritableStore:
    def __init__(self, section: StoreSection) -> None:
        self._section = section
        self._store: ObjectStore | None = None
        self._probing = threading.Lock()

    def get(self) -> ObjectStore:
        """Raises UnsafeStore or StoreError, and then probes again next time."""
        with self._probing:
            self._store = self._store or open_store(self._section, probe=True)
            return self._store
