"""One way a data set lies on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from lipdp.data.stored import DataSplit
from lipdp.errors import DataError


class Source(ABC):
    """One way a data set lies on disk."""

    needs_folder = True

    def present(self, root: Path) -> bool:
        """Whether all files of the set are in `root`; then no download is tried."""
        return True

    def fetch(self, root: Path) -> None:  # noqa: B027 - a set that is present needs none
        """Download the set into `root`, in the layout `read` expects."""

    @abstractmethod
    def read(self, root: Path) -> DataSplit:
        """Read or open the set and check it; DataError if it is not whole and valid."""


@dataclass(frozen=True)
class OwnSource(Source):
    """A set of the user's own: a file or a folder, by its path, or by its name in the data folder."""

    path: Path

    @property
    def needs_folder(self) -> bool:  # type: ignore[override]
        return not self.path.exists()

    def present(self, root: Path) -> bool:
        return (root / self.path).exists()

    def fetch(self, root: Path) -> None:
        raise DataError(f"{self.path} is not a data set that can be fetched: give the path of one that exists")
