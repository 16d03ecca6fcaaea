"""The monitor's store: an SQLite file (mode 0600) with the counts and labels of every round, and no prompts or answers."""

import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from sku_vllm.errors import ConfigError

SCHEMA = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (id INTEGER PRIMARY KEY, time REAL NOT NULL, outcome TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS counts (
    round INTEGER NOT NULL REFERENCES rounds, series TEXT NOT NULL, hits INTEGER NOT NULL, n INTEGER NOT NULL,
                                   PRIMARY KEY (round, series));
CREATE TABLE IF NOT EXISTS labels (round INTEGER NOT NULL REFERENCES rounds, probe TEXT NOT NULL, label TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS detectors (series TEXT PRIMARY KEY, tolerated REAL NOT NULL, levels TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS counters (arm TEXT PRIMARY KEY, hits INTEGER NOT NULL, n INTEGER NOT NULL);
"""


class History:
    """The store of one monitored server and probe set.

    Args:
        path: SQLite file, created when absent.
        identity: what the counts depend on (probe digests, judge, model); a store of another identity is refused, because
            its baseline would not apply.

    Raises:
        ConfigError: the file is not such a store, or was written with another identity.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, object]) -> None:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self.database = sqlite3.connect(path, timeout=30, check_same_thread=False)
            self.database.executescript(SCHEMA)
            stored = dict(self.database.execute("SELECT key, value FROM about"))
        except (OSError, sqlite3.DatabaseError) as error:
            raise ConfigError(
                f"--store {path}: {getattr(error, 'strerror', None) or error}; give a new file or one that sku monitor wrote"
            ) from error
        wanted = {key: json.dumps(value) for key, value in identity.items()}
        changed = [key for key in wanted if stored and stored.get(key) != wanted[key]]
        if changed:
            raise ConfigError(
                f"--store {path}: was begun with another {' and '.join(changed)}; its baseline does not apply, use a new --store"
            )
        with self.database:
            self.database.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", wanted.items())

    def add_round(self, time: float, outcome: str, counts: Mapping[str, tuple[int, int]], labels: Mapping[str, str]) -> int:
        """Record one round: (hits, n) per series and the label of every probe by its digest. Returns its number."""
        with self.database:
            number = self.database.execute("INSERT INTO rounds (time, outcome) VALUES (?, ?)", (time, outcome)).lastrowid
            self.database.executemany("INSERT INTO counts VALUES (?, ?, ?, ?)", [(number, name, *pair) for name, pair in counts.items()])
            self.database.executemany("INSERT INTO labels VALUES (?, ?, ?)", [(number, probe, label) for probe, label in labels.items()])
        return int(number or 0)

    def rounds(self) -> dict[str, int]:
        """Number of rounds per outcome."""
        return dict(self.database.execute("SELECT outcome, count(*) FROM rounds GROUP BY outcome"))

    def series(self, name: str) -> list[tuple[float, int, int]]:
        """(time, hits, n) of every round that has this series, oldest first."""
        query = "SELECT time, hits, n FROM counts JOIN rounds ON rounds.id = counts.round WHERE series = ? ORDER BY rounds.id"
        return self.database.execute(query, (name,)).fetchall()

    def detector(self, series: str) -> tuple[float, list[float]] | None:
        """(tolerated rate, levels) of the series' detector, once its baseline is complete."""
        row = self.database.execute("SELECT tolerated, levels FROM detectors WHERE series = ?", (series,)).fetchone()
        return (row[0], json.loads(row[1])) if row else None

    def keep_detector(self, series: str, tolerated: float, levels: list[float]) -> None:
        """Store the state of a series' detector after a round."""
        with self.database:
            self.database.execute("INSERT OR REPLACE INTO detectors VALUES (?, ?, ?)", (series, tolerated, json.dumps(levels)))

    def since_last(self, arm: str, hits: int, n: int) -> tuple[int, int]:
        """(hits, n) since the previous round from two counters; the first call and a restarted server count from zero."""
        row = self.database.execute("SELECT hits, n FROM counters WHERE arm = ?", (arm,)).fetchone()
        with self.database:
            self.database.execute("INSERT OR REPLACE INTO counters VALUES (?, ?, ?)", (arm, hits, n))
        before = row if row and row[1] <= n and row[0] <= hits else (0, 0)
        # The judged and harmful counters are read one after the other; an answer judged in between must not make hits exceed n.
        return min(hits - before[0], n - before[1]), n - before[1]

    def close(self) -> None:
        """Close the file."""
        self.database.close()
