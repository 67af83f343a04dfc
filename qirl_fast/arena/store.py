"""Votes in one SQLite file, safe when several processes write and when they are killed.

raters    who votes: kind 'person', or 'model' for a judge; never both under one name
pictures  SHA-256 of every picture that was ever compared: votes are of these and no others
shown     which question a rater got as their 1st, 2nd, ... and which model stood left
votes     one row a rater and question, the primary key: a second click changes nothing
history   every vote and every change of one, append-only (triggers refuse anything else)
looks     when a rater asked for the results

A vote says which model was preferred, 'a' or 'b' in the alphabet's order, or 'tie', or 'bad' (both
bad), not the side. Write-ahead log; each call is one transaction and is on the disk when it
returns.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qirl_fast.arena.study import Item

CHOICES = ("a", "b", "tie", "bad")
APPLICATION, VERSION = 0x51415245, 1  # "QARE"
WAIT_S = 30
LONGEST_NAME = 40
TOO_FAST_S = 0.5  # nobody compares two pictures in that time: the second half of a double click

SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE raters (
      name TEXT PRIMARY KEY, kind TEXT NOT NULL CHECK (kind IN ('person', 'model')),
      since REAL NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE pictures (
      prompt TEXT, model TEXT, sha256 TEXT NOT NULL, PRIMARY KEY (prompt, model)
    ) WITHOUT ROWID""",
    """CREATE TABLE shown (
      rater TEXT NOT NULL REFERENCES raters (name), prompt TEXT NOT NULL, a TEXT NOT NULL,
      b TEXT NOT NULL CHECK (a < b), place INTEGER NOT NULL,
      left TEXT NOT NULL CHECK (left IN ('a', 'b')), at REAL NOT NULL,
      UNIQUE (rater, prompt, a, b), UNIQUE (rater, place)
    )""",
    """CREATE TABLE votes (
      id INTEGER PRIMARY KEY, rater TEXT NOT NULL REFERENCES raters (name), prompt TEXT NOT NULL,
      a TEXT NOT NULL, b TEXT NOT NULL CHECK (a < b),
      choice TEXT NOT NULL CHECK (choice IN ('a', 'b', 'tie', 'bad')), looked INTEGER NOT NULL,
      UNIQUE (rater, prompt, a, b)
    )""",
    """CREATE TABLE history (
      id INTEGER PRIMARY KEY AUTOINCREMENT, vote INTEGER NOT NULL REFERENCES votes (id),
      choice TEXT NOT NULL, at REAL NOT NULL
    )""",
    "CREATE TABLE looks (id INTEGER PRIMARY KEY, rater TEXT NOT NULL, at REAL NOT NULL)",
    """CREATE TRIGGER history_stays BEFORE UPDATE ON history
      BEGIN SELECT RAISE(ABORT, 'the history of votes is append-only'); END""",
    """CREATE TRIGGER history_is_kept BEFORE DELETE ON history
      BEGIN SELECT RAISE(ABORT, 'the history of votes is append-only'); END""",
)


class StoreError(ValueError):
    """A database or a vote that cannot be used; the message says what came and what is wanted."""


@dataclass(frozen=True)
class Vote:
    """looked: the rater had asked for the results before."""

    rater: str
    item: Item
    choice: str
    looked: bool


@dataclass(frozen=True)
class Shown:
    """A rater's question number `place`, from 1. choice: the vote on it, None before one."""

    item: Item
    place: int
    left: str
    at: float
    choice: str | None


class Store:
    """An open database. Its methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=WAIT_S, isolation_level=None, check_same_thread=False
            )
            self._db.execute(f"PRAGMA busy_timeout = {WAIT_S * 1000}")
            self._open()
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"{path}: cannot be used as a database of votes ({error}); put back a copy, or "
                "name another file: database=FILE"
            ) from error

    def _open(self) -> None:
        marks = [self._one(f"PRAGMA {name}") for name in ("application_id", "user_version")]
        tables = self._one("SELECT count(*) FROM sqlite_master")
        if tables and marks != [APPLICATION, VERSION]:
            raise StoreError(
                f"{self.path}: is another program's database, or of another version ({marks[1]}; "
                f"wanted {VERSION}); name another file: database=FILE"
            )
        if tables and (said := self._one("PRAGMA quick_check(1)")) != "ok":
            raise sqlite3.DatabaseError(said)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        with self._transaction():  # another process may have made it in the meantime
            if not self._one("SELECT count(*) FROM sqlite_master"):
                for statement in SCHEMA:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {VERSION}")
                self._db.execute("INSERT INTO meta VALUES ('secret', ?)", (secrets.token_hex(32),))

    def close(self) -> None:
        """Close the file; what was voted is in it already."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _one(self, query: str, *values: object) -> Any:
        with self._lock:
            row = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]

    def _all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    @property
    def secret(self) -> bytes:
        """Made with the database; names of pictures are hashed with it."""
        return bytes.fromhex(str(self._one("SELECT value FROM meta WHERE key = 'secret'")))

    def agree(self, key: str, value: str) -> None:
        """Keep a setting that must not change while votes come in; StoreError where it has."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
            was = self._one("SELECT value FROM meta WHERE key = ?", key)
        if was != value:
            raise StoreError(
                f"{self.path}: this study was begun with {key}={was}, not {value}; go back to it, "
                "or begin another: database=FILE"
            )

    def know(self, digests: Mapping[tuple[str, str], str]) -> None:
        """Note the pictures; StoreError where one is not the picture that was voted on."""
        with self._transaction():
            for (prompt, model), digest in digests.items():
                self._db.execute(
                    "INSERT OR IGNORE INTO pictures VALUES (?, ?, ?)", (prompt, model, digest)
                )
            kept = self._all("SELECT prompt, model, sha256 FROM pictures")
            changed = [key for *key, was in kept if digests.get(tuple(key), was) != was]
            if changed:
                prompt, model = changed[0]
                raise StoreError(
                    f"{self.path}: {len(changed)} pictures are not those of this study any more, "
                    f"the first {model}'s of {prompt!r}; put them back, or begin another study: "
                    "database=FILE"
                )

    def rater(self, name: str, kind: str = "person") -> str:
        """The rater's name, tidied and known from now on."""
        tidy = " ".join(name.split())
        if not 1 <= len(tidy) <= LONGEST_NAME or not tidy.isprintable():
            raise StoreError(f"got the name {tidy[:60]!r}; wanted 1 to {LONGEST_NAME} characters")
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO raters VALUES (?, ?, ?)", (tidy, kind, time.time())
            )
            was = self._one("SELECT kind FROM raters WHERE name = ?", tidy)
        if was != kind:
            raise StoreError(f"{tidy!r} is the name of a {was}; choose another")
        return tidy

    def show(self, rater: str, item: Item, left: str) -> Shown:
        """Give a rater a question, as the next in their row."""
        with self._transaction():
            last = self._one("SELECT max(place) FROM shown WHERE rater = ?", rater)
            place, now = (last or 0) + 1, time.time()
            self._db.execute(
                "INSERT OR IGNORE INTO shown VALUES (?, ?, ?, ?, ?, ?, ?)",
                (rater, item.prompt, item.a, item.b, place, left, now),
            )
        return next(s for s in self.shown(rater) if s.item == item)

    def shown(self, rater: str) -> list[Shown]:
        """The rater's questions in order."""
        rows = self._all(
            "SELECT s.prompt, s.a, s.b, s.place, s.left, s.at, v.choice FROM shown s LEFT JOIN "
            "votes v USING (rater, prompt, a, b) WHERE rater = ? ORDER BY s.place",
            rater,
        )
        return [Shown(Item(p, a, b), place, left, at, c) for p, a, b, place, left, at, c in rows]

    def cast(self, rater: str, item: Item, choice: str) -> str:
        """Keep a vote: 'new', 'changed', 'same', or 'too fast' where it was not kept.

        A person votes on what they were shown; StoreError otherwise.
        """
        if choice not in CHOICES:
            raise StoreError(f"got the vote {choice!r}; wanted one of {', '.join(CHOICES)}")
        key = (rater, item.prompt, item.a, item.b)
        where = "WHERE rater = ? AND prompt = ? AND a = ? AND b = ?"
        with self._transaction():
            kind = self._one("SELECT kind FROM raters WHERE name = ?", rater)
            at, now = self._one(f"SELECT at FROM shown {where}", *key), time.time()
            if kind is None or (kind == "person" and at is None):
                raise StoreError(f"{rater!r} was not shown this pair; reload the page")
            was = self._one(f"SELECT choice FROM votes {where}", *key)
            if was == choice:
                return "same"
            if was is None and at is not None and 0 <= now - at < TOO_FAST_S:
                return "too fast"
            looked = self._one("SELECT count(*) > 0 FROM looks WHERE rater = ?", rater)
            self._db.execute(
                "INSERT INTO votes (rater, prompt, a, b, choice, looked) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET choice = excluded.choice, "
                "looked = max(looked, excluded.looked)",
                (*key, choice, looked),
            )
            vote = self._one(f"SELECT id FROM votes {where}", *key)
            self._db.execute(
                "INSERT INTO history (vote, choice, at) VALUES (?, ?, ?)", (vote, choice, now)
            )
        return "new" if was is None else "changed"

    def votes(self, kind: str = "person") -> list[Vote]:
        """All votes of people, or of judges, in the order in which they were first cast."""
        rows = self._all(
            "SELECT v.rater, v.prompt, v.a, v.b, v.choice, v.looked FROM votes v "
            "JOIN raters r ON r.name = v.rater WHERE r.kind = ? ORDER BY v.id",
            kind,
        )
        return [Vote(r, Item(p, a, b), c, bool(k)) for r, p, a, b, c, k in rows]

    def changes(self) -> int:
        """How often a vote was changed."""
        return int(self._one("SELECT count(*) - count(DISTINCT vote) FROM history"))

    def stamp(self) -> int:
        """Another number after every vote."""
        return int(self._one("SELECT coalesce(max(id), 0) FROM history"))

    def look(self, rater: str) -> None:
        """Note that a rater has asked for the results."""
        with self._transaction():
            self._db.execute("INSERT INTO looks (rater, at) VALUES (?, ?)", (rater, time.time()))
