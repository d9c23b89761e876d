"""Fetches pictures from the hosts that the operator allows, and from nowhere else.

A name is resolved once, and the connection goes to that very address, which must be a public one. So a name that
resolves to something else a moment later gains nothing. Every redirect is checked like a first address.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from emu3.serving.errors import Refused

_MOST_REDIRECTS = 3
# IPv6 networks whose addresses hold one of IPv4: compatible, mapped, NAT64, 6to4, Teredo.
_WITH_IPV4 = [
    ipaddress.IPv6Network(each) for each in ("::/96", "::ffff:0:0/96", "64:ff9b::/32", "2002::/16", "2001::/32")
]
_PORTS = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and holds no other that is none."""
    ip = ipaddress.ip_address(address)
    if ip.is_multicast or not ip.is_global:
        return False
    return ip.version == 4 or not (ip.is_site_local or any(ip in network for network in _WITH_IPV4))


@dataclass(frozen=True)
class Fetcher:
    """Fetches from some hosts.

    Args:
        hosts: names that are allowed, in lower case; ".example.com" allows all names that end so.
        most_bytes, seconds: limits of each picture.
        is_public: whether an address may be connected to; tests replace it.
    """

    hosts: Sequence[str]
    most_bytes: int = 20_000_000
    seconds: float = 10.0
    is_public: Callable[[str], bool] = lambda address: is_public(address)

    def fetch(self, address: str, param: str) -> bytes:
        """The content at an address. Refused where it is not allowed, too large, or too slow."""
        deadline = time.monotonic() + self.seconds
        for _ in range(_MOST_REDIRECTS + 1):
            found = self._get(address, param, deadline)
            if isinstance(found, bytes):
                return found
            address = urljoin(address, found)
        raise Refused(400, "the picture's address redirects too often", param)

    def _get(self, address: str, param: str, deadline: float) -> bytes | str:
        """The content, or where a redirect leads."""
        scheme, host, port, target = self._parse(address, param)
        try:
            found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        except OSError:
            raise Refused(400, "the host of the picture's address is unknown", param) from None
        if not found or not all(self.is_public(str(ip)) for ip in found):
            raise Refused(400, "the picture's address is not a public one", param)
        connection = http.client.HTTPConnection(host, port, timeout=max(0.1, deadline - time.monotonic()))
        try:
            stream = socket.create_connection((str(min(found)), port), connection.timeout)
            connection.sock = stream
            if scheme == "https":
                connection.sock = stream = ssl.create_default_context().wrap_socket(stream, server_hostname=host)
            connection.request("GET", target, headers={"user-agent": "emu3", "accept": "image/*, video/*"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308) and (location := response.getheader("location")):
                return location
            if response.status != http.client.OK:
                raise Refused(400, f"the picture's address answers with status {response.status}", param)
            content = bytearray()
            # `read1` takes what is there; `read` would wait for all of it, each piece with the whole time.
            while part := response.read1(65536):
                content += part
                stream.settimeout(max(0.1, deadline - time.monotonic()))
                if len(content) > self.most_bytes:
                    raise Refused(413, f"a picture may have {self.most_bytes // 1_000_000} MB", param)
                if time.monotonic() > deadline:
                    raise Refused(400, "the picture takes too long to fetch", param)
            return bytes(content)
        except (OSError, http.client.HTTPException):
            raise Refused(400, "the picture cannot be fetched", param) from None
        finally:
            connection.close()

    def _parse(self, address: str, param: str) -> tuple[str, str, int, str]:
        """Scheme, host, port and target; what is checked is what is used."""
        try:
            parts = urlsplit(address)
            host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme, 0)
            host.encode("ascii")
        except (ValueError, UnicodeError):
            raise Refused(400, "the picture's address is malformed", param) from None
        odd = set(address) & set("\\\t\r\n @") or not address.isprintable()
        if odd or parts.scheme not in _PORTS or port != _PORTS[parts.scheme] or parts.username is not None:
            raise Refused(400, "the picture's address must be a plain http or https address", param)
        if not any(host == name or (name.startswith(".") and host.endswith(name)) for name in self.hosts):
            raise Refused(400, "pictures are not fetched from this host", param)
        target = parts.path or "/"
        return parts.scheme, host, port, f"{target}?{parts.query}" if parts.query else target
