"""What the text of a statement of PostgreSQL says, and what it does not."""

from __future__ import annotations

import pytest

from workerpools.sqlalchemy._texts import NOTHING, Does, read


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1",
        "select a.id, lower(a.name) from a where a.id in (%s, %s) and a.x = any(array[1]) limit 3",
        "SELECT CASE WHEN a THEN 1 END, count(*) FROM t GROUP BY b",
        "WITH q AS (SELECT 1) SELECT * FROM q",
        "VALUES (1), (2)",
        "TABLE orders",
        "select 'it''s; commit', $$ ; commit; $$, $a$ delete $a$, \"Insert\" from t",
        "SELECT pg_catalog.version();",
        "/* a /* b */ */ select cast(a as varchar(20)) -- delete from t",
    ],
)
def test_plain_reads(statement: str) -> None:
    assert read(statement) == (Does.READ, True, False, False, False)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO t VALUES (1)",
        "SELECT * FROM t FOR UPDATE",
        "WITH d AS (DELETE FROM t RETURNING *) SELECT * FROM d",
        "SELECT a INTO b FROM t",
        "SELECT sell(1)",
        'SELECT "lower"(a) FROM t',
        "SELECT shop.lower('a')",
        "SELECT pg_notify('a', 'b')",
        "SELECT nextval('s')",
        "SELECT set_config('a.b', 'c', false)",
        "SELECT pg_advisory_lock(1)",
        "SELECT (r).write_it FROM r",
        "NOTIFY a",
        "EXECUTE p(1)",
        "DECLARE c CURSOR FOR SELECT sell(1)",
        "EXPLAIN ANALYZE DELETE FROM t",
        "SELECT 1; SELECT 2",
        r"SELECT '\'; DELETE FROM t'",
    ],
)
def test_anything_else_may_do_more(statement: str) -> None:
    assert read(statement).does is Does.OTHER


@pytest.mark.parametrize(
    ("statement", "ends", "undoes"),
    [
        ("commit", True, False),
        ("-- done\nCOMMIT", True, False),
        ("/* a */ -- b\n end", True, False),
        ("COMMIT PREPARED 'a'", True, False),
        ("PREPARE TRANSACTION 'a'", True, False),
        ("PREPARE a AS INSERT INTO t VALUES (1)", False, False),
        ("INSERT INTO t VALUES ('x'); -- finish\nCOMMIT; -- x\nBEGIN", True, False),
        ("INSERT INTO t VALUES ('x'); ROLLBACK", True, False),
        ("CALL p()", True, False),
        ("DO $$BEGIN COMMIT; END$$", True, False),
        (r"SELECT '\'; COMMIT", True, False),
        ("ROLLBACK", False, True),
        ("abort;", False, True),
        ("rollback to savepoint a", False, False),
        ("ROLLBACK WORK TO a", False, False),
        ("SELECT 'commit'", False, False),
        ("SELECT CASE WHEN a THEN 1 END", False, False),
        ("UPDATE t SET a = 1", False, False),
    ],
)
def test_what_may_end_a_transaction(statement: str, ends: bool, undoes: bool) -> None:
    found = read(statement)
    assert (found.may_end, found.undoes) == (ends, undoes)


@pytest.mark.parametrize("statement", ["", " ", ";", "-- a", "/* a */ ;;"])
def test_nothing(statement: str) -> None:
    assert read(statement) is NOTHING


def test_the_rest() -> None:
    assert read("copy t to stdout").copies
    assert read("SET a = 1").does is read("SAVEPOINT a").does is read("LISTEN a").does is Does.CONTROL
