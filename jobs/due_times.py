"""When a cron expression is due, in a time zone, across the changes of its clocks."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from croniter import croniter

from pipeline.errors import ConfigError

FIELDS = 5  # minute, hour, day, month, weekday: what crontab and Kubernetes take


@dataclass(frozen=True)
class DueTimes:
    """All in UTC. A time that the clocks skip is due when they have jumped; one that they show twice is due twice.

    Where clocks change by half an hour (Lord Howe Island alone), croniter 7 may leave out a time of that hour.
    """

    cron: str
    zone: ZoneInfo

    def after(self, moment: datetime) -> datetime:
        """The first due time later than `moment`."""
        found: datetime = croniter(self.cron, moment.astimezone(self.zone)).get_next(datetime)
        return found.astimezone(UTC)

    def until(self, moment: datetime) -> datetime:
        """The last due time that is not later than `moment`."""
        # In UTC: the last microsecond before clocks go back is followed by an hour they have shown.
        later = (moment.astimezone(UTC) + timedelta(microseconds=1)).astimezone(self.zone)
        found: datetime = croniter(self.cron, later).get_prev(datetime).astimezone(UTC)
        # Of a time that the clocks show twice croniter finds the first from here.
        while (next_one := self.after(found)) <= moment:
            found = next_one
        return found


def due_times(cron: str, *, timezone: str) -> DueTimes:
    """Raises ConfigError where either is none, or where no such time ever comes."""
    try:
        zone = ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):
        raise ConfigError(f"There is no time zone {timezone!r}; write it as Europe/Berlin, or UTC.") from None
    times = DueTimes(" ".join(cron.split()), zone)
    try:
        if len(cron.split()) != FIELDS:
            raise ValueError("it takes five fields: minute, hour, day, month, weekday")
        times.after(datetime.now(UTC))
        times.until(datetime.now(UTC))
    except ValueError as error:
        raise ConfigError(
            f'The schedule {cron!r} cannot be read ({error}); every night at two is "0 2 * * *".'
        ) from None
    return times
