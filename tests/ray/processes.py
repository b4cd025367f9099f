"""The processes of a test's own Ray."""

import os
from pathlib import Path


def pids_of(name: str) -> list[int]:
    """Workers of this test's own Ray: children of the raylet that this process started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if (folder / "cmdline").read_bytes().startswith(name.encode()) and _parent(
                    _parent(int(folder.name))
                ) == os.getpid():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
