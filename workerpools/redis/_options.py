"""Checks the driver's options where they are declared, and makes the TLS context of them."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from typing import Any

from workerpools.adapter import refusal, whole
from workerpools.errors import ConfigurationError

__all__ = ["TLS", "check_options", "tls_context"]


#: Options of the TLS context, which is built once.
TLS = frozenset(
    (
        "ssl_ca_certs",
        "ssl_ca_data",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_ciphers",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
    )
)

_OPTIONS = TLS | {
    "client_name",
    "credential_provider",
    "db",
    "decode_responses",
    "encoding",
    "encoding_errors",
    "password",
    "protocol",
    "socket_keepalive",
    "socket_keepalive_options",
    "socket_read_size",
    "socket_type",
    "username",
}

_NO_RETRY = "a lost command would be sent twice; workerpools sends again what may be sent again"

#: What the driver has an option for, and what to say instead.
_INSTEAD = {
    "cache": "client-side caching is not supported",
    "cache_config": "client-side caching is not supported",
    "connection_pool": "the connection pool is workerpools' own",
    "health_check_interval": "use check_after",
    "host": "name the server in the URL",
    "max_connections": "use the option max_connections of {called}",
    "port": "name the server in the URL",
    "retry": _NO_RETRY,
    "retry_on_error": _NO_RETRY,
    "retry_on_timeout": _NO_RETRY,
    "single_connection_client": "use the client's method client()",
    "socket_connect_timeout": "use connect_timeout",
    "socket_timeout": "use timeout",
    "ssl": "begin the URL with rediss://",
    "timeout": "use the option timeout of {called}",
    "unix_socket_path": "use a URL such as unix:///path/to/socket",
}


def check_options(options: Mapping[str, Any], secure: bool, called: str, own: Iterable[str]) -> None:
    """Refuse options that the driver does not have, or that something else decides.

    Args:
        options: The driver's options.
        secure: Whether connections are encrypted.
        called: The declaration's name, for messages.
        own: The options of the declaration itself.

    Raises:
        ConfigurationError: One of them is refused.
    """
    for name in sorted(options.keys() & _INSTEAD.keys()):
        raise ConfigurationError(
            f"{called}: the driver's option {name} is not taken: {_INSTEAD[name].format(called=called)}"
        )
    if unknown := options.keys() - _OPTIONS:
        raise ConfigurationError(f"{called}: there is no option {refusal(unknown, _OPTIONS.union(own))}")
    if not secure and (tls := options.keys() & TLS):
        raise ConfigurationError(f"{called}: {', '.join(sorted(tls))}: for a URL that begins with rediss://")
    if options.get("protocol", 2) not in (2, 3, None):
        raise ConfigurationError(f"{called}(protocol=…): wanted 2 or 3")
    if options.get("db") is not None:
        whole(options["db"], f"{called}(db")
    for name in ("username", "password", "client_name"):
        if not isinstance(options.get(name) or "", str):
            raise ConfigurationError(f"{called}({name}=…): wanted a string")


def tls_context(options: Mapping[str, Any]) -> ssl.SSLContext:
    """Build the TLS context that the driver's options describe.

    Args:
        options: Those of :data:`TLS`.
    """
    context = ssl.create_default_context()
    wanted = options.get("ssl_cert_reqs", "required")
    modes: dict[Any, Any] = {
        "none": ssl.CERT_NONE,
        "optional": ssl.CERT_OPTIONAL,
        "required": ssl.CERT_REQUIRED,
        None: ssl.CERT_NONE,
    }
    mode = modes.get(wanted, wanted)
    context.check_hostname = bool(options.get("ssl_check_hostname", True)) and mode != ssl.CERT_NONE
    context.verify_mode = mode
    key: Any = options.get("ssl_keyfile")
    certificate: Any = options.get("ssl_certfile") or key
    if certificate:
        context.load_cert_chain(certificate, key, options.get("ssl_password"))
    authorities = {f"ca{name}": options.get(f"ssl_ca_{given}") for name, given in _AUTHORITIES}
    if any(authorities.values()):
        context.load_verify_locations(**authorities)
    if options.get("ssl_min_version") is not None:
        context.minimum_version = options["ssl_min_version"]
    if options.get("ssl_ciphers"):
        context.set_ciphers(options["ssl_ciphers"])
    return context


_AUTHORITIES = (("file", "certs"), ("path", "path"), ("data", "data"))
