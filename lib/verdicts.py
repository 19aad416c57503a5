"""Verdicts in a file that outlives the process: what a judge has said once is never asked again.

SQLite, so that processes can share it.
"""

import os
import sqlite3
import time
from pathlib import Path

from lib.files import DataError, expect_file
from lib.risk import as_risk

TABLE = "verdicts (key TEXT PRIMARY KEY, risk REAL, mass REAL, prompt TEXT, response TEXT)"
PATIENCE = 600  # seconds that another process may have the file locked


class VerdictFile:
    """{key: (risk, mass)}, with the text beside it for the reader; a context manager.

    Raises DataError where the file is none of verdicts.
    """

    def __init__(self, path: Path):
        self.path, self.fresh, self.kept_at = Path(path), [], time.monotonic()

    def do(self, work):
        """work() on the open file. Waits where another process has it locked, which is printed.

        In SQLite itself only for a second at a time: no signal is heard there. Raises DataError that names
        the file for all else that goes wrong.
        """
        began, told = time.monotonic(), False
        while True:
            try:
                return work()
            except sqlite3.Error as error:
                code = getattr(error, "sqlite_errorcode", None)
                locked = code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                if not locked or time.monotonic() - began > PATIENCE:
                    raise DataError(f"{self.path}: expected a file of verdicts that can be read and written, "
                                    f"found: {error}") from None
                if not told:
                    print(f"{self.path}: waiting for another process, which has it locked")
                told = True

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self.path):
            expect_file(self.path, 1 << 60)
        self.file = self.do(lambda: sqlite3.connect(self.path, timeout=1))
        found = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"
        made = self.do(lambda: self.file.execute(found).fetchall())
        if made not in ([], [(f"CREATE TABLE {TABLE}",)]):
            self.file.close()  # a view or a trigger could do anything
            raise DataError(f"{self.path}: expected a file of verdicts that can be read and written, "
                            f"found {str(made)[:200]}")
        self.do(lambda: self.file.execute(f"CREATE TABLE IF NOT EXISTS {TABLE}"))
        return self

    def __exit__(self, *error):
        try:
            self.keep()  # also after an error: what came before it stays
        finally:
            self.file.close()

    def find(self, keys) -> dict[str, tuple[float, float]]:
        """What is known of the keys. Raises DataError for a risk or a mass that is not in [0, 1]."""
        select = "SELECT risk, mass FROM verdicts WHERE key = ?"
        rows = self.do(lambda: {key: self.file.execute(select, [key]).fetchone() for key in set(keys)})
        return {key: tuple(as_risk(value, f"{self.path}: verdict {key[:12]}") for value in row)
                for key, row in rows.items() if row and None not in row}

    def add(self, key: str, risk: float, mass: float, prompt: str, response: str) -> None:
        """Remember a verdict; at most a second of them is lost with the process."""
        self.fresh.append((key, risk, mass, prompt, response))
        if time.monotonic() - self.kept_at > 1:
            self.keep()

    def keep(self) -> None:
        """Write what is fresh."""
        def write():
            self.file.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?)", self.fresh)
            self.file.commit()

        self.do(write)
        self.fresh, self.kept_at = [], time.monotonic()
