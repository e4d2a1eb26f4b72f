"""What the operating system gives to connections: the interfaces that the environment names, and open files."""

import os
import resource
import socket

from megatron_posttrain.errors import UserError, nearest

OPEN_FILES = 65_536  # sockets and files of a rank, where the hard limit allows as many


def raise_file_limit() -> None:
    """The usual soft limit, 1,024, is that of programs which know no better; a rank among hundreds has more sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_interfaces() -> list[str]:
    """Interfaces that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name. Raises UserError where this host has none such.
    gloo takes names; NCCL takes beginnings of names, exact ones behind `=`, and what to leave out behind `^`."""
    here = [name for _, name in socket.if_nameindex()]
    used: list[str] = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        text = os.environ.get(variable, "")
        if not text or text.startswith("^"):
            continue
        wanted = text.removeprefix("=").split(",")
        exact = variable.startswith("GLOO") or text.startswith("=")
        found = [name for name in here if (name in wanted if exact else name.startswith(tuple(wanted)))]
        if not found or (variable.startswith("GLOO") and set(found) != set(wanted)):
            absent = next(name for name in wanted if name not in found)
            raise UserError(
                f"{variable}={text}: this host has no network interface '{absent}'{nearest(absent, here)} "
                f"(it has {', '.join(here)})"
            )
        used += found
    return used
