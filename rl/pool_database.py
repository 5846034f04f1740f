"""The tables of a data pool in SQLite or PostgreSQL: append-only, whole transactions.

A PostgreSQL server that goes away is waited for and connected to again; rows of an insert that it
may have taken before are looked for first. No torch here.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, cast

from rl.errors import ConfigError, InfraError

BUSY_S = 30.0
TABLES = ("calls", "rewards", "steps")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
  id {serial}, episode TEXT NOT NULL, member INTEGER NOT NULL, prompt {blob} NOT NULL,
  response {blob} NOT NULL, logprobs {blob} NOT NULL, meta TEXT NOT NULL, digest TEXT NOT NULL,
  UNIQUE (episode, member));
CREATE TABLE IF NOT EXISTS rewards (
  id {serial}, episode TEXT NOT NULL UNIQUE, meta TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS steps (
  id {serial}, step INTEGER NOT NULL, meta TEXT NOT NULL, digest TEXT NOT NULL)
"""
_KEYS = {"calls": ("episode", "member"), "rewards": ("episode",)}
_SQLITE_GUARD = """
CREATE TRIGGER IF NOT EXISTS {table}_{verb} BEFORE {verb} ON {table}
BEGIN SELECT RAISE(ABORT, 'the pool is append-only'); END
"""
_POSTGRES_REFUSAL = """
CREATE OR REPLACE FUNCTION pool_is_append_only() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'the pool is append-only'; END $$
"""
_POSTGRES_GUARD = """
CREATE OR REPLACE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
EXECUTE FUNCTION pool_is_append_only()
"""
_POSTGRES_LOCK = 7_351_902  # of the schema, so that processes that start together make it once


class Connection(Protocol):
    """What is used of a database connection (DB-API)."""

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any: ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...

    def close(self) -> None: ...


def is_postgres(url: str) -> bool:
    return url.startswith(("postgresql://", "postgres://"))


class Database:
    """Thread-safe. InfraError when it cannot be used, ConfigError when `create` is False and there
    is no pool."""

    def __init__(self, url: str, *, create: bool) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._postgres = is_postgres(url)
        if not create and not self._postgres and not Path(url).is_file():
            raise ConfigError(f"{url}: no such pool; name the file that a run has written")
        with self._reported():
            if not create and not self._postgres:
                self._refuse_foreign()
            self._db = self._open()
            if self._postgres:
                self._make_postgres(create)
            else:
                self._make_sqlite()

    def insert(self, table: str, columns: str, rows: Sequence[Sequence[Any]]) -> None:
        """Append rows, all or none; the last column is their digest."""
        places = ", ".join("?" * len(columns.split(",")))
        sql = f"INSERT INTO {table} ({columns}) VALUES ({places})"
        with self._lock, self._reported():
            try:
                self._write(sql, rows)
            except Exception:
                if not self._lost():
                    raise
                self._connect_again()
                if not self._has(table, rows):
                    self._write(sql, rows)

    def select(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """All rows."""
        with self._lock, self._reported():
            try:
                return self._read(sql, values)
            except Exception:
                if not self._lost():
                    raise
                self._connect_again()
                return self._read(sql, values)

    def close(self) -> None:
        """Let go of the database."""
        with self._lock:
            self._db.close()

    # ---------------------------------------------------------- opening

    def _refuse_foreign(self) -> None:
        """A file of others is looked at, not made a pool of."""
        with closing(sqlite3.connect(self.url, timeout=BUSY_S)) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        if not {"calls", "rewards"} <= tables:
            raise ConfigError(f"{self.url}: is no pool; name the file that a run has written")

    def _open(self) -> Connection:
        if self._postgres:
            try:
                import psycopg
            except ImportError:
                raise ConfigError(
                    f"{self.url}: PostgreSQL needs the package psycopg; install selfevo[postgres]"
                ) from None
            return cast(Connection, psycopg.connect(self.url, connect_timeout=int(BUSY_S)))
        db = sqlite3.connect(self.url, timeout=BUSY_S, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # whole after a crash of the process or machine
        return db

    def _make_sqlite(self) -> None:
        for statement in _SCHEMA.format(serial="INTEGER PRIMARY KEY", blob="BLOB").split(";\n"):
            self._db.execute(statement)
        for table in TABLES:
            for verb in ("UPDATE", "DELETE"):
                self._db.execute(_SQLITE_GUARD.format(table=table, verb=verb))
        self._db.commit()

    def _make_postgres(self, create: bool) -> None:
        """Tables and guards, in one transaction, where they are not there yet."""
        there = self._read("SELECT to_regclass('calls'), to_regclass('steps')", ())[0]
        if all(there):
            return
        if not create:
            raise ConfigError("the database has no pool; name the one that a run has written to")
        self._db.execute(f"SELECT pg_advisory_xact_lock({_POSTGRES_LOCK})")
        for statement in _SCHEMA.format(serial="BIGSERIAL PRIMARY KEY", blob="BYTEA").split(";\n"):
            self._db.execute(statement)
        self._db.execute(_POSTGRES_REFUSAL)
        for table in TABLES:
            self._db.execute(_POSTGRES_GUARD.format(table=table))
        self._db.commit()

    # ---------------------------------------------------------- one transaction

    def _write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        try:
            for values in rows:
                self._db.execute(self._sql(sql), values)
            self._db.commit()
        except BaseException:
            with suppress(Exception):  # of a connection that is gone
                self._db.rollback()
            raise

    def _read(self, sql: str, values: Sequence[Any]) -> list[Any]:
        try:
            return list(self._db.execute(self._sql(sql), values).fetchall())
        finally:
            if self._postgres:  # else a transaction stays open, and after an error refuses all
                with suppress(Exception):
                    self._db.rollback()

    def _sql(self, text: str) -> str:
        return text.replace("?", "%s") if self._postgres else text

    # ---------------------------------------------------------- a server that goes away

    def _lost(self) -> bool:
        return self._postgres and bool(cast(Any, self._db).closed)

    def _connect_again(self) -> None:
        until = time.monotonic() + BUSY_S
        while True:
            try:
                self._db = self._open()
                return
            except ConfigError:
                raise
            except Exception:
                if time.monotonic() > until:
                    raise
                time.sleep(0.25)

    def _has(self, table: str, rows: Sequence[Sequence[Any]]) -> bool:
        """Whether the server took the rows before it was lost: all or none of a transaction. A
        step's record may be there twice."""
        if table not in _KEYS or not rows:
            return False
        keys = _KEYS[table]
        where = " AND ".join(f"{key} = ?" for key in keys)
        found = self._read(f"SELECT digest FROM {table} WHERE {where}", rows[0][: len(keys)])
        return bool(found) and found[0][0] == rows[0][-1]

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InfraError(
                f"{self.url}: {error}; check the disk and that the file is a pool"
            ) from error
        except Exception as error:
            if self._postgres and type(error).__module__.startswith("psycopg"):
                reason = " ".join(str(error).split())
                raise InfraError(f"the pool's database: {reason}; check its URL") from error
            raise
