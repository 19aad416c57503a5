"""Verdicts in a file that outlives the process: what a judge has said once is never asked again.

SQLite, so that processes can share it.
"""

import os
import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path

from lib.files import DataError, expect_file
from lib.risk import as_risk

TABLE = "verdicts (key TEXT PRIMARY KEY, risk REAL, mass REAL, prompt TEXT, response TEXT)"


class VerdictFile:
    """{key: (risk, mass)}, with the text beside it for the reader; a context manager.

    Raises DataError where the file is none of verdicts.
    """

    def __init__(self, path: Path):
        self.path, self.fresh, self.kept_at = Path(path), [], time.monotonic()

    @contextmanager
    def errors(self):
        """SQLite's errors, told of the file."""
        try:
            yield
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: expected a file of verdicts that can be read and written, "
                            f"found: {error}") from None

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self.path):
            expect_file(self.path, 1 << 60)
        with self.errors():
            self.file = sqlite3.connect(self.path, timeout=600)
            made = self.file.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
            if made not in ([], [(f"CREATE TABLE {TABLE}",)]):  # a view or a trigger could do anything
                self.file.close()
                raise sqlite3.Error(str(made)[:200])
            self.file.execute(f"CREATE TABLE IF NOT EXISTS {TABLE}")
        return self

    def __exit__(self, *error):
        try:
            self.keep()  # also after an error: what came before it stays
        finally:
            self.file.close()

    def find(self, keys) -> dict[str, tuple[float, float]]:
        """What is known of the keys. Raises DataError for a risk or a mass that is not in [0, 1]."""
        with self.errors():
            rows = {key: self.file.execute("SELECT risk, mass FROM verdicts WHERE key = ?", [key]).fetchone()
                    for key in set(keys)}
        return {key: tuple(as_risk(value, f"{self.path}: verdict {key[:12]}") for value in row)
                for key, row in rows.items() if row and None not in row}

    def add(self, key: str, risk: float, mass: float, prompt: str, response: str) -> None:
        """Remember a verdict; at most a second of them is lost with the process."""
        self.fresh.append((key, risk, mass, prompt, response))
        if time.monotonic() - self.kept_at > 1:
            self.keep()

    def keep(self) -> None:
        """Write what is fresh."""
        with self.errors():
            self.file.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?)", self.fresh)
            self.file.commit()
        self.fresh, self.kept_at = [], time.monotonic()
