"""The units as systemd reads them, and the crontab as a cron parser does."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.cluster.conftest import ROOT

UNITS = ROOT / "cluster/systemd"


def analyze(*arguments: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_systemd_reads_the_units(tmp_path: Path) -> None:
    """With a program in place of wiseline, which is not at that path here."""
    for unit in UNITS.iterdir():
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text)
    checked = analyze("verify", "--man=no", *(str(path) for path in sorted(tmp_path.iterdir())))
    ours = [line for line in checked.stderr.splitlines() if "wiseline" in line]
    assert (checked.returncode, ours) == (0, [])


def test_a_mistake_in_a_unit_would_be_noticed(tmp_path: Path) -> None:
    text = (UNITS / "wiseline-round.timer").read_text().replace("Persistent=", "Persistant=")
    (tmp_path / "wiseline-round.timer").write_text(text)
    assert "Persistant" in analyze("verify", "--man=no", str(tmp_path / "wiseline-round.timer")).stderr


def test_the_timer_is_every_night_at_two() -> None:
    [calendar] = re.findall(r"^OnCalendar=(.+)$", (UNITS / "wiseline-round.timer").read_text(), re.MULTILINE)
    said = analyze("calendar", calendar)
    assert said.returncode == 0
    assert "02:00:00 UTC" in said.stdout


def test_the_crontab_is_every_night_at_two() -> None:
    croniter = pytest.importorskip("croniter").croniter
    lines = (ROOT / "cluster/crontab").read_text().splitlines()
    jobs = [line for line in lines if re.match(r"[\d*]", line)]
    assert [" ".join(job.split()[:5]) for job in jobs] == ["0 2 * * *"]
    assert croniter.is_valid("0 2 * * *")
    assert not any("%" in job for job in jobs)  # cron takes % for the end of the line
    commands = [job.split(maxsplit=5)[5] for job in jobs]
    for command in commands:
        assert subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0
