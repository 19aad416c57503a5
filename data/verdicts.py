"""A file of verdicts that outlives the process: what a judge has said once is never asked again. SQLite, so that processes can share it."""

import sqlite3
import time
from pathlib import Path

from data import DataError


class VerdictFile:
    """{key: (risk, mass)}, with the text beside it for the reader; a context manager. Raises DataError where the file is no such file."""

    def __init__(self, path: Path):
        self.path, self.fresh, self.kept_at = Path(path), [], time.monotonic()

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = sqlite3.connect(self.path, timeout=600)
        self.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, risk REAL, mass REAL, prompt TEXT, response TEXT)")
        return self

    def __exit__(self, *error):
        try:
            self.keep()  # also after an error: what came before it stays
        finally:
            self.file.close()

    def execute(self, statement: str, *values):
        try:
            return self.file.execute(statement, values)
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: expected a file of verdicts that can be read and written, found: {error}") from None

    def find(self, keys) -> dict[str, tuple[float, float]]:
        """What is known of the keys."""
        rows = {key: self.execute("SELECT risk, mass FROM verdicts WHERE key = ?", key).fetchone() for key in set(keys)}
        return {key: row for key, row in rows.items() if row}

    def add(self, key: str, risk: float, mass: float, prompt: str, response: str) -> None:
        """Remember a verdict; at most a second of them is lost with the process."""
        self.fresh.append((key, risk, mass, prompt, response))
        if time.monotonic() - self.kept_at > 1:
            self.keep()

    def keep(self) -> None:
        """Write what is fresh."""
        for row in self.fresh:
            self.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?)", *row)
        self.file.commit()
        self.fresh, self.kept_at = [], time.monotonic()
