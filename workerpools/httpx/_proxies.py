"""Proxies: as options, and of the environment, which httpx reads only for transports that it makes itself."""

from __future__ import annotations

import ipaddress
import urllib.request
from typing import Any

from workerpools.errors import ConfigurationError

from ._library import httpx

__all__ = ["environment_proxies", "usable_proxy"]


def usable_proxy(proxy: Any, what: str) -> Any:
    """Return a proxy in a form that httpx accepts.

    Args:
        proxy: The proxy, or None.
        what: The proxy's source, for the message.

    Raises:
        ConfigurationError: It is not a proxy's URL. The message omits it, unlike httpx's own.
    """
    if proxy is None or isinstance(proxy, httpx.Proxy):
        return proxy
    try:
        usable, url = httpx.Proxy(proxy), httpx.URL(proxy)
        if url.host and b"@" not in url.raw_path and "@" not in url.fragment:
            return usable
    except (TypeError, ValueError, httpx.InvalidURL):
        pass
    raise ConfigurationError(
        f"{what} is invalid (not shown here, as it may contain a password); wanted: "
        "http://proxy.example.com:3128, with special characters of a password escaped (urllib.parse.quote)"
    )


def environment_proxies() -> dict[str, httpx.Proxy | None]:
    """Return httpx mounts for the proxies in the environment.

    httpx reads them only for transports that it creates itself. The variables are curl's: HTTP_PROXY, HTTPS_PROXY,
    ALL_PROXY and NO_PROXY, as read by :func:`urllib.request.getproxies`.

    Raises:
        ConfigurationError: One of them is not a proxy's URL.
    """
    found = urllib.request.getproxies()
    exempt = [host.strip() for host in found.get("no", "").split(",") if host.strip()]
    if "*" in exempt:
        return {}
    mounts: dict[str, httpx.Proxy | None] = {}
    for scheme in ("http", "https", "all"):
        if url := found.get(scheme):
            variable = f"the environment variable {scheme.upper()}_PROXY"
            mounts[f"{scheme}://"] = usable_proxy(url if "://" in url else f"http://{url}", variable)
    for host in exempt:
        mounts[_exempt_pattern(host)] = None
    return mounts


def _exempt_pattern(host: str) -> str:
    if "://" in host:
        return host
    name = host.strip("[]")
    try:
        address = ipaddress.ip_interface(name).ip
    except ValueError:
        if name.lower() == "localhost":
            return f"all://{name}"
    else:
        return f"all://[{address}]" if address.version == 6 else f"all://{address}"
    # A domain covers its subdomains: "*" matches the name itself and everything under it.
    return f"all://*{name}"
