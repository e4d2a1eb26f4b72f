"""A seccomp filter (man 2 seccomp): system calls that a program in the sandbox is refused."""

import ctypes
import errno
import os
import struct

# By name: the number on x86_64 and on aarch64. What reaches other processes, mounts, the kernel's own programs and
# keys, and memory that no limit counts (memfd, System V).
_DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "unshare": (272, 97), "setns": (308, 268), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_NEW_NAMESPACES = 0x7E020000  # of clone's flags
_X32, _AF_UNIX = 0x40000000, 1
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _operation(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("HBBI", code, then, otherwise, value)


def build_filter(machine: str) -> bytes:
    """The filter for an architecture. Raises OSError for one whose numbers are not known here."""
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no system call filter for {machine}, only for {', '.join(_ARCHITECTURES)}")
    column = list(_ARCHITECTURES).index(machine)
    refuse = _operation(_RETURN, _ERRNO | errno.EPERM)
    allow = _operation(_RETURN, _ALLOW)
    parts = [
        _operation(_LOAD, _ARCHITECTURE),
        _operation(_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _operation(_RETURN, _KILL),  # another table of numbers
        _operation(_LOAD, _NUMBER),
        _operation(_AT_LEAST, _X32, 0, 1),
        refuse,
    ]
    for numbers in _DENIED.values():
        parts += [_operation(_EQUAL, numbers[column], 0, 1), refuse]
    # Its flags lie in memory, out of a filter's sight; the C library then takes clone.
    parts += [_operation(_EQUAL, _CLONE3[column], 0, 1), _operation(_RETURN, _ERRNO | errno.ENOSYS)]
    parts += [_operation(_EQUAL, _CLONE[column], 0, 4), _operation(_LOAD, _ARGUMENT)]
    parts += [_operation(_ANY_BIT, _NEW_NAMESPACES, 0, 1), refuse, allow]
    # The network namespace is empty, but VSOCK and others know no namespaces.
    parts += [_operation(_EQUAL, _SOCKET[column], 0, 4), _operation(_LOAD, _ARGUMENT)]
    parts += [_operation(_EQUAL, _AF_UNIX, 1, 0), refuse, allow]
    return b"".join([*parts, allow])


def install(libc: ctypes.CDLL) -> None:
    """For this process and all that it starts, for good. Raises OSError where the kernel refuses."""
    code = build_filter(os.uname().machine)
    program = _Program(len(code) // 8, code)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) or libc.prctl(
        _PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(program), zero, zero
    ):
        raise OSError(ctypes.get_errno(), "seccomp refused")
