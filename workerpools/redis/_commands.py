"""What the commands do: which only read, which leave something on their connection. Pure tables and functions.

The tables follow the flags that servers answer COMMAND with (Valkey 9.1, Redis 8); a test compares them with those of
a real one. A command that is not in them, such as a module's, may do anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["UNKNOWN", "Command", "command_of", "server_wait"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Flagged ``readonly``. Also scripts that may not write, which the server also keeps from publishing.
READS = _names(
    """
    BITCOUNT BITFIELD_RO BITPOS CLUSTERSCAN DBSIZE DUMP EVALSHA_RO EVAL_RO EXISTS EXPIRETIME FCALL_RO GEODIST GEOHASH
    GEOPOS GEORADIUSBYMEMBER_RO GEORADIUS_RO GEOSEARCH GET GETBIT GETRANGE HEXISTS HEXPIRETIME HGET HGETALL HKEYS HLEN
    HMGET HPEXPIRETIME HPTTL HRANDFIELD HSCAN HSTRLEN HTTL HVALS KEYS LCS LINDEX LLEN LOLWUT LPOS LRANGE MGET
    PEXPIRETIME PFCOUNT PTTL RANDOMKEY SCAN SCARD SDIFF SINTER SINTERCARD SISMEMBER SMEMBERS SMISMEMBER SORT_RO
    SRANDMEMBER SSCAN STRLEN SUBSTR SUNION TOUCH TTL TYPE XLEN XPENDING XRANGE XREAD XREVRANGE ZCARD ZCOUNT ZDIFF
    ZINTER ZINTERCARD ZLEXCOUNT ZMSCORE ZRANDMEMBER ZRANGE ZRANGEBYLEX ZRANGEBYSCORE ZRANK ZREVRANGE ZREVRANGEBYLEX
    ZREVRANGEBYSCORE ZREVRANK ZSCAN ZSCORE ZUNION
    """
) | {
    "MEMORY USAGE",
    "OBJECT ENCODING",
    "OBJECT FREQ",
    "OBJECT IDLETIME",
    "OBJECT REFCOUNT",
    "XINFO CONSUMERS",
    "XINFO GROUPS",
    "XINFO STREAM",
}

#: Flagged ``write``, and done wholly or not at all: they check everything before they change anything, so that an
#: error as the answer means that nothing was done.
WRITES = _names(
    """
    APPEND BITFIELD BITOP BLMOVE BLMPOP BLPOP BRPOP BRPOPLPUSH BZMPOP BZPOPMAX BZPOPMIN COPY DECR DECRBY DEL DELIFEQ
    EXPIRE EXPIREAT FLUSHALL FLUSHDB GEOADD GEORADIUS GEORADIUSBYMEMBER GEOSEARCHSTORE GETDEL GETEX GETSET HDEL HEXPIRE
    HEXPIREAT HGETDEL HGETEX HINCRBY HINCRBYFLOAT HMSET HPERSIST HPEXPIRE HPEXPIREAT HSET HSETEX HSETNX INCR INCRBY
    INCRBYFLOAT LINSERT LMOVE LMPOP LPOP LPUSH LPUSHX LREM LSET LTRIM MOVE MSET MSETEX MSETNX PERSIST PEXPIRE PEXPIREAT
    PFADD PFMERGE PSETEX RENAME RENAMENX RESTORE RPOP RPOPLPUSH RPUSH RPUSHX SADD SDIFFSTORE SET SETBIT SETEX SETNX
    SETRANGE SINTERSTORE SMOVE SORT SPOP SREM SUNIONSTORE SWAPDB UNLINK XACK XADD XAUTOCLAIM XCLAIM XDEL XREADGROUP
    XSETID XTRIM ZADD ZDIFFSTORE ZINCRBY ZINTERSTORE ZMPOP ZPOPMAX ZPOPMIN ZRANGESTORE ZREM ZREMRANGEBYLEX
    ZREMRANGEBYRANK ZREMRANGEBYSCORE ZUNIONSTORE
    """
) | {"XGROUP CREATE", "XGROUP CREATECONSUMER", "XGROUP DELCONSUMER", "XGROUP DESTROY", "XGROUP SETID"}

#: Without either flag: they ask, or concern their own connection only, which ends with what they did. SCRIPT LOAD
#: leaves the same however often it is done: the server keeps scripts by their digests.
HARMLESS = _names(
    """
    ASKING AUTH COMMAND DISCARD ECHO HELLO INFO LASTSAVE MONITOR MULTI PING PSUBSCRIBE PSYNC PUNSUBSCRIBE QUIT READONLY
    READWRITE RESET ROLE SELECT SSUBSCRIBE SUBSCRIBE SUNSUBSCRIBE SYNC TIME UNSUBSCRIBE UNWATCH WAIT WAITAOF WATCH
    """
) | {
    *(f"ACL {name}" for name in ("CAT", "DRYRUN", "GENPASS", "GETUSER", "LIST", "USERS", "WHOAMI")),
    *(f"CLIENT {name}" for name in ("CACHING", "CAPA", "GETNAME", "GETREDIR", "ID", "IMPORT-SOURCE", "INFO", "LIST")),
    *(f"CLIENT {name}" for name in ("NO-EVICT", "NO-TOUCH", "REPLY", "SETINFO", "SETNAME", "TRACKING", "TRACKINGINFO")),
    *(f"CLUSTER {name}" for name in ("COUNTKEYSINSLOT", "GETKEYSINSLOT", "INFO", "KEYSLOT", "LINKS", "MYID")),
    *(f"CLUSTER {name}" for name in ("MYSHARDID", "NODES", "REPLICAS", "SHARDS", "SLAVES", "SLOTS")),
    *(f"COMMAND {name}" for name in ("COUNT", "DOCS", "GETKEYS", "GETKEYSANDFLAGS", "INFO", "LIST")),
    "CONFIG GET",
    *(f"FUNCTION {name}" for name in ("DUMP", "LIST", "STATS")),
    *(f"LATENCY {name}" for name in ("DOCTOR", "GRAPH", "HISTOGRAM", "HISTORY", "LATEST")),
    *(f"MEMORY {name}" for name in ("DOCTOR", "MALLOC-STATS", "STATS")),
    "MODULE LIST",
    *(f"PUBSUB {name}" for name in ("CHANNELS", "NUMPAT", "NUMSUB", "SHARDCHANNELS", "SHARDNUMSUB")),
    *(f"SCRIPT {name}" for name in ("DEBUG", "EXISTS", "LOAD", "SHOW")),
    *(f"SLOWLOG {name}" for name in ("GET", "LEN")),
}

#: Commands with subcommands.
CONTAINERS = _names(
    """
    ACL CLIENT CLUSTER COMMAND COMMANDLOG CONFIG DEBUG FUNCTION LATENCY MEMORY MODULE OBJECT PUBSUB SCRIPT SENTINEL
    SLOWLOG XGROUP XINFO
    """
)

#: They leave something on their connection that the next task must not find.
LEAVING = _names(
    """
    ASKING AUTH HELLO MONITOR MULTI PSUBSCRIBE PSYNC QUIT READONLY READWRITE REPLCONF RESET SELECT SSUBSCRIBE SUBSCRIBE
    SYNC WATCH
    """
) | {
    *(f"CLIENT {name}" for name in ("CACHING", "CAPA", "IMPORT-SOURCE", "NO-EVICT", "NO-TOUCH", "REPLY", "SETINFO")),
    *(f"CLIENT {name}" for name in ("SETNAME", "TRACKING")),
    "SCRIPT DEBUG",
}

#: WATCH and MULTI end with one of these.
ENDING = {"EXEC": ("MULTI", "WATCH"), "DISCARD": ("MULTI", "WATCH"), "UNWATCH": ("WATCH",)}

#: Where the arguments of a command that waits on the server have the longest wait, and how many of it make a second.
_WAITS = {
    **dict.fromkeys(("BLPOP", "BRPOP", "BRPOPLPUSH", "BZPOPMIN", "BZPOPMAX", "BLMOVE"), (-1, 1.0)),
    **dict.fromkeys(("BLMPOP", "BZMPOP"), (1, 1.0)),
    **dict.fromkeys(("WAIT", "WAITAOF"), (-1, 1000.0)),
}
_WAIT_OPTION = ("XREAD", "XREADGROUP")


class Command(NamedTuple):
    """What is known of a command.

    Attributes:
        name: Its name, of its subcommand, too.
        harmless: Whether it may be sent again: it changes nothing that outlives its connection.
        whole: Whether an error as its answer means that it did nothing.
        leaves: Whether it leaves something on its connection.
        waits: Whether its arguments may ask the server to wait.
    """

    name: str
    harmless: bool
    whole: bool
    leaves: bool = False
    waits: bool = False


#: What was sent without its name.
UNKNOWN = Command("a command", harmless=False, whole=False, leaves=True)

#: The longest name shown: a mistake may put anything in its place.
_SHOWN = 40


def _command(name: str) -> Command:
    return Command(
        name if name.replace(" ", "").replace("-", "").replace("_", "").replace(".", "").isalnum() else "a command",
        name in READS or name in HARMLESS,
        name in READS or name in HARMLESS or name in WRITES,
        name in LEAVING,
        name in _WAITS or name in _WAIT_OPTION,
    )


_known = {name: _command(name) for name in (*READS, *WRITES, *HARMLESS, "PUBLISH", "EVAL", "EVALSHA", "FCALL", "EXEC")}


def command_of(arguments: Sequence[Any]) -> Command:
    """Return what is known of a command.

    Args:
        arguments: The command and its arguments, as the driver takes them: a subcommand may be a part of the first.
    """
    first = arguments[0] if arguments else ""
    found = _known.get(first) if type(first) is str else None
    return found if found is not None else _looked_up(arguments)


def _looked_up(arguments: Sequence[Any]) -> Command:
    words = [_text(argument) for argument in arguments[:2]]
    name = " ".join(words[:1]).upper().split()
    if len(name) == 1 and name[0] in CONTAINERS:
        name += words[1].upper().split()[:1] if len(words) > 1 else []
    joined = " ".join(name).strip()[:_SHOWN]
    return _known.get(joined) or _command(joined)


def _text(argument: Any) -> str:
    if isinstance(argument, (bytes, bytearray, memoryview)):
        return bytes(argument).decode(errors="replace")
    return str(argument)


def server_wait(command: Command, arguments: Sequence[Any]) -> float | None:
    """Return how long a command asks the server to wait, in seconds; None for ever.

    Args:
        command: What is known of it.
        arguments: The command and its arguments.
    """
    if not command.waits:
        return 0.0
    words = (*_text(arguments[0]).split(), *arguments[1:])
    if command.name in _WAITS:
        place, units = _WAITS[command.name]
    else:
        place, units = _block_option(words), 1000.0
        if place == 0:
            return 0.0
    try:
        seconds = float(_text(words[place])) / units
    except (IndexError, ValueError):
        # The server refuses it.
        return 0.0
    return seconds if seconds > 0 else None


def _block_option(words: Sequence[Any]) -> int:
    """Return the place of what follows the word BLOCK among a command's options; 0 without it."""
    for place, word in enumerate(words):
        text = _text(word).upper()
        if text == "STREAMS":
            break
        if text == "BLOCK":
            return place + 1
    return 0
