"""No connection leaves this machine, in any process of the tests: Python imports a module of this name before anything else.

`attempts` beside this file gets one JSON line for each connection or look-up of a name that was stopped: to where, by which
program, and from where in it. Only Python's own sockets are seen.
"""

import ipaddress
import json
import os
import socket
import sys
import traceback

ATTEMPTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "attempts")
LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
SENDING = ("socket.connect", "socket.sendto", "socket.sendmsg")


def leaves(event, arguments):
    """Where an audit event would reach, if that is not this machine; else None."""
    if event in SENDING:
        end, address = arguments[:2]
        inside = end.family not in (socket.AF_INET, socket.AF_INET6) or address is None or loopback(address[0])
        return None if inside else f"{address[0]}:{address[1]}"
    if event in LOOK_UPS:
        name = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        here = name in (None, "", "localhost", socket.gethostname()) or numeric(name)
        return None if here else name
    return None


def numeric(name):
    """The address that a text is, or None: it needs no look-up."""
    try:
        return ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None


def loopback(host):
    """Whether the host is this machine, by an address that no other can have."""
    return host in ("", "localhost") or (numeric(host) or ipaddress.ip_address("192.0.2.1")).is_loopback


def stop(event, arguments):
    """The audit hook: note what would leave the machine, and raise OSError as if there were no network."""
    if event not in SENDING + LOOK_UPS:
        return
    place = leaves(event, arguments)
    if place is None:
        return
    stack = "".join(traceback.format_stack(sys._getframe(1), limit=20))
    with open(ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({"to": place, "by": " ".join(sys.orig_argv)[:300], "at": stack}) + "\n")
    raise OSError(101, f"No network in tests, found a connection to {place}")


sys.addaudithook(stop)
