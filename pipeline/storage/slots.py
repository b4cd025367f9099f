"""What every slot of the log says now, for processes that stay: of a log that moved only what is new is read."""

from pipeline.storage.edit_log import EditLog, LogEntry


class Slots:
    """`newest`: slot id → its newest entry, retractions too, in log order; `heard`: how many entries there are."""

    def __init__(self, log: EditLog) -> None:
        self._log = log
        self.version: int | None = None
        self.newest: dict[str, LogEntry] = {}
        self.heard = 0

    def catch_up(self) -> bool:
        """Whether the log moved since the last time. Raises StoreError."""
        version = self._log.version()
        if version is None or version == self.version:
            return False
        for entry in self._log.history(version, since=self.heard):
            self.newest.pop(entry.edit.slot_id, None)
            self.newest[entry.edit.slot_id] = entry
            self.heard = entry.seq + 1
        self.version = version
        return True
