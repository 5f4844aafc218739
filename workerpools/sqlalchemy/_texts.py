"""A PostgreSQL statement's text: whether it plainly reads, and whether it may end its transaction. Pure functions.

A text proves nothing: a view may call a function that writes. It only decides which proof the server is asked for, and
what is assumed about a statement whose answer was lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

__all__ = ["NOTHING", "Does", "Text", "read"]


class Does(Enum):
    """What a statement does, by its text."""

    #: It reads tables and calls functions of PostgreSQL that only compute.
    READ = "read"
    #: It affects the session or the transaction alone: SET, SAVEPOINT, LISTEN.
    CONTROL = "control"
    #: Anything else: it may write, notify, lock or reach another server.
    OTHER = "other"


class Text(NamedTuple):
    """A statement's text.

    Attributes:
        does: What it does.
        single: Whether it is exactly one statement.
        copies: Whether it is a COPY, which needs the driver's own methods.
        may_end: Whether it may end the transaction by a COMMIT.
        undoes: Whether it is a ROLLBACK of the whole transaction, and nothing else.
    """

    does: Does
    single: bool = True
    copies: bool = False
    may_end: bool = False
    undoes: bool = False


#: Of a text without a statement: an empty one, or comments.
NOTHING = Text(Does.CONTROL, single=False)

_READS = frozenset(("select", "values", "table", "with"))
_CONTROL_WORDS = """
    abort begin close commit deallocate discard end listen lock prepare release reset rollback savepoint set show
    start unlisten
"""
_CONTROLS = frozenset(_CONTROL_WORDS.split())
_ENDS = frozenset(("abort", "commit", "end", "prepare", "rollback"))
#: Also inside a procedure or a DO block, outside of a transaction block.
_MAY_END_ANYWHERE = _ENDS | {"call", "do"}

#: With these a statement that begins like a read does more: it writes (also in a WITH query), creates a table (INTO) or
#: locks rows (FOR UPDATE).
_MORE_WORDS = """
    call delete do execute for insert into merge truncate update
"""
_DOES_MORE = frozenset(_MORE_WORDS.split())

#: What may stand before a parenthesis without being a function: keywords and types with a length.
_KEYWORD_WORDS = """
    all and any array as between bit by case cast char character check cube distinct dec decimal else end escape
    except exists filter float from group grouping having ilike in interval intersect is isnull join lateral like
    limit materialized not notnull numeric nullif offset on only or order over overlaps partition range recursive
    rollup row rows select sets similar some symmetric tablesample then time timestamp to union using values varbit
    varchar varying when where window with within xmlattributes xmlelement xmlforest zone
"""
_KEYWORDS = frozenset(_KEYWORD_WORDS.split())

#: Functions of PostgreSQL that only compute or look: they change no row, no session and no sequence, and reach no other
#: server (PostgreSQL documentation, chapter "Functions and Operators").
_COMPUTING = """
    abs acos age any_value array_agg array_append array_cat array_dims array_length array_lower array_position
    array_positions array_prepend array_remove array_replace array_to_json array_to_string array_upper ascii asin
    atan atan2 avg bit_and bit_length bit_or bit_xor bool_and bool_or btrim cardinality cbrt ceil ceiling
    char_length character_length chr clock_timestamp coalesce col_description concat concat_ws convert convert_from
    convert_to corr cos cot count covar_pop covar_samp cume_dist current_database current_date current_schema
    current_schemas current_time current_timestamp current_user date_bin date_part date_trunc decode degrees
    dense_rank div encode every exp extract factorial first_value floor format format_type gcd gen_random_uuid
    generate_series generate_subscripts get_bit get_byte greatest hashtext host initcap isfinite json_agg
    json_array_elements json_array_elements_text json_array_length json_build_array json_build_object json_each
    json_each_text json_extract_path json_extract_path_text json_object json_object_agg json_object_keys
    json_to_record json_to_recordset json_typeof jsonb_agg jsonb_array_elements jsonb_array_elements_text
    jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text jsonb_extract_path
    jsonb_extract_path_text jsonb_insert jsonb_object jsonb_object_agg jsonb_object_keys jsonb_path_exists
    jsonb_path_match jsonb_path_query jsonb_path_query_array jsonb_path_query_first jsonb_pretty jsonb_set
    jsonb_strip_nulls jsonb_to_record jsonb_to_recordset jsonb_typeof justify_days justify_hours justify_interval
    lag last_value lcm lead least left length ln localtime localtimestamp log log10 lower lpad ltrim make_date
    make_interval make_time make_timestamp make_timestamptz masklen max md5 min mod mode network now nth_value ntile
    num_nonnulls num_nulls numnode obj_description octet_length overlay parse_ident percent_rank percentile_cont
    percentile_disc pg_backend_pid pg_column_size pg_get_constraintdef pg_get_expr pg_get_indexdef
    pg_get_serial_sequence pg_get_viewdef pg_is_in_recovery pg_relation_size pg_size_pretty pg_sleep
    pg_table_is_visible pg_table_size pg_total_relation_size pg_type_is_visible pg_typeof phraseto_tsquery pi
    plainto_tsquery position power quote_ident quote_literal quote_nullable radians random rank regexp_count
    regexp_instr regexp_like regexp_match regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table
    regexp_substr regr_slope repeat replace reverse right round row_number row_to_json rpad rtrim scale session_user
    sha224 sha256 sha384 sha512 shobj_description sign sin split_part sqrt starts_with statement_timestamp stddev
    stddev_pop stddev_samp string_agg string_to_array string_to_table strpos substr substring sum tan timezone
    to_ascii to_char to_date to_hex to_json to_jsonb to_number to_regclass to_timestamp to_tsquery to_tsvector
    transaction_timestamp translate trim trunc ts_headline ts_rank ts_rank_cd unistr unnest upper user var_pop
    var_samp variance version websearch_to_tsquery width_bucket
"""
_COMPUTES = frozenset(_COMPUTING.split())

_TOKEN = re.compile(
    r"""
      (?P<space>\s+|--[^\n]*)
    | (?P<comment>/\*)
    | (?P<quoted>[eE]?'(?:[^']|'')*'|\$(?P<tag>[A-Za-z_\u0080-\uffff]?[\w]*)\$.*?\$(?P=tag)\$)
    | (?P<name>"(?:[^"]|"")*")
    | (?P<word>[A-Za-z_\u0080-\uffff][\w$]*)
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_WORD = re.compile(r"[a-z_]+")


@lru_cache(1000)
def read(statement: str) -> Text:
    """Return what a statement's text says.

    Args:
        statement: One or several statements, with or without the driver's placeholders.
    """
    if "\\" in statement:
        # Where a string ends depends on the setting standard_conforming_strings.
        words = set(_WORD.findall(statement.lower()))
        ends = not _MAY_END_ANYWHERE.isdisjoint(words)
        return Text(Does.OTHER, single=False, copies="copy" in words, may_end=ends)
    statements = [found for found in _statements(statement) if found]
    if not statements:
        return NOTHING
    first = [found[0] for found in statements]
    if len(statements) > 1:
        ends = not _MAY_END_ANYWHERE.isdisjoint(first)
        return Text(Does.OTHER, single=False, copies="copy" in first, may_end=ends)
    tokens = statements[0]
    word = tokens[0]
    if word in _CONTROLS:
        after = tokens[1:2]
        if after == ["prepared"] or tokens[:2] == ["prepare", "transaction"]:
            return Text(Does.OTHER, may_end=True)
        # PREPARE name AS only names a statement; ROLLBACK TO goes on.
        undoes = word in ("abort", "rollback") and "to" not in tokens[1:4]
        return Text(Does.CONTROL, may_end=word in ("commit", "end"), undoes=undoes)
    reads = word in _READS and _DOES_MORE.isdisjoint(tokens) and all(_known_calls(tokens))
    return Text(Does.READ if reads else Does.OTHER, copies=word == "copy", may_end=word in _MAY_END_ANYWHERE)


def _statements(text: str) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for token in _tokens(text):
        if token == ";":
            found.append([])
        else:
            found[-1].append(token)
    return found


def _tokens(text: str) -> Iterator[str]:
    """Yield words in lower case, quoted names, and every other character outside of strings and comments."""
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match is not None
        at = match.end()
        kind = match.lastgroup
        if kind == "comment":
            at = _comment_ends(text, at)
        elif kind == "word":
            yield match[0].lower()
        elif kind in ("name", "other"):
            yield match[0]
        elif match["quoted"] is not None:
            yield "''"


def _comment_ends(text: str, at: int) -> int:
    # PostgreSQL's comments nest.
    depth = 1
    while depth and (edge := _COMMENT_EDGE.search(text, at)):
        depth += 1 if edge[0] == "/*" else -1
        at = edge.end()
    return len(text) if depth else at


def _known_calls(tokens: list[str]) -> Iterator[bool]:
    for index, token in enumerate(tokens):
        if token == "." and index > 0 and tokens[index - 1] == ")":
            # Attribute notation: (row).name may call name(row).
            yield False
        if token != "(" or index == 0:
            continue
        name = tokens[index - 1]
        if not (name[0].isalpha() or name[0] in '_"'):
            continue
        if index > 1 and tokens[index - 2] == ".":
            yield tokens[index - 3] == "pg_catalog" and name in _COMPUTES
        else:
            yield name in _KEYWORDS or name in _COMPUTES
