"""Where the jobs of a server are kept."""

from __future__ import annotations

from typing import NamedTuple

from penstock.jobs.options import JobsOptions
from penstock.jobs.store import without_password


class Place(NamedTuple):
    """``where``: as ``open_store`` takes it."""

    where: str
    options: JobsOptions

    @property
    def shown(self) -> str:
        """For people and logs, which are not to have a password."""
        return without_password(self.where)
