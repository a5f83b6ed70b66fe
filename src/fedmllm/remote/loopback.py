"""Which user a connection within this machine comes from. Only Linux says."""

from __future__ import annotations

import os
import re
import struct
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
"""The kernel's connections: local and remote address, state, …, user. Anybody may read them."""
ATTEMPTS = 5
"""How often the tables are read before a connection counts as missing: rows can be skipped if others vanish meanwhile."""
Address = tuple[str, int]
"""Host, as a number, and port."""


def is_own(client: Address, server: Address) -> bool:
    """Whether the other end of a connection, `client`, is a process of this user on this machine.

    On systems other than Linux, whether it is a process of this machine.
    """
    try:
        host, own = _unmapped(client[0]), _unmapped(server[0])
    except ValueError:
        return False
    if sys.platform != "linux":
        return host.is_loopback or host == own
    row = f" (?:{_forms(host, client[1])}) (?:{_forms(own, server[1])}) 01 \\S+ \\S+ \\S+ +{os.geteuid()} "
    return any(re.search(row, table.read_text()) for _ in range(ATTEMPTS) for table in TABLES if table.exists())


def _unmapped(host: str) -> IPv4Address | IPv6Address:
    address = ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address


def _forms(address: IPv4Address | IPv6Address, port: int) -> str:
    """How the kernel writes an address: words in the order of this machine's bytes. A socket for both versions of IP has an
    IPv4 address mapped to IPv6."""
    forms = [address.packed] if address.version == 6 else [address.packed, IPv6Address(f"::ffff:{address}").packed]
    return "|".join("".join(f"{word:08X}" for (word,) in struct.iter_unpack("=I", form)) + f":{port:04X}" for form in forms)
