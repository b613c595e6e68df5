"""Runs inside the sandbox's first process: closes the doors, then becomes the program. Standard library only.

Started by ``rayllm.sandbox`` as ``python -I sandbox_launcher.py``, in a session of its own, with the limits as JSON in
its one argument. In order: new namespaces (no network, no view of other processes, a file system of its own), a root
that has Python and the system's libraries and nothing else, no privileges, limits, the program. Whatever of this fails
ends it with the status ``NOT_CLOSED`` and a line of text on standard error: nothing runs that is not shut in.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

NOT_CLOSED = 121
"""Exit status when the sandbox could not be closed."""

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
PIVOT_ROOT, MOUNT_SETATTR = {"x86_64": 155, "aarch64": 41}, 442
"""Numbers of system calls that the C library has no function for."""

SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
FIRST_UID = 2_000_000_000
"""For a launcher that is root: a user of its own for every program, whom nobody else is."""

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    checked(libc.mount(*arguments), f"mount {source} on {target}")


def enter_namespaces() -> None:
    """Network, processes, files, IPC and host name of its own. Without root: as the same user in a user namespace."""
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    checked(libc.unshare(flags | (CLONE_NEWUSER if uid else 0)), "unshare")
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def build_root(folder_bytes: int, folders: list[str]) -> None:
    """A new file system: an empty /tmp of ``folder_bytes``, the system's libraries and ``folders``, read-only; these
    may lie below /tmp."""
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    root = "/proc"  # hides nothing that is needed from here on
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.makedirs(f"{root}/tmp")
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={folder_bytes},nr_inodes=4096,mode=1777")
    for folder in sorted({*SYSTEM_FOLDERS, *folders}):
        bind(folder, root + folder)
    for device in ("null", "zero", "urandom"):
        bind(f"/dev/{device}", f"{root}/dev/{device}")
    os.chdir(root)
    checked(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    checked(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/tmp")
    set_attributes("/", MOUNT_ATTR_RDONLY, 0)


def bind(source: str, target: str) -> None:
    """The same file or folder there, read-only; a link stays a link, and what does not exist is left out."""
    if os.path.lexists(target) or not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        open(target, "x").close()
    mount(source, target, "none", MS_BIND | MS_REC)
    if not source.startswith("/dev/"):
        set_attributes(target, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, AT_RECURSIVE)


def set_attributes(target: str, attributes: int, flags: int) -> None:
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    result = libc.syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, ctypes.byref(wanted), ctypes.sizeof(wanted))
    checked(result, f"mount_setattr {target}")


def drop_privileges(uid: int | None) -> None:
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")


def set_limits(settings: dict[str, Any]) -> None:
    for name, value in (
        (resource.RLIMIT_CPU, settings["cpu_s"]),
        (resource.RLIMIT_AS, settings["memory_bytes"]),
        (resource.RLIMIT_FSIZE, settings["file_bytes"]),
        (resource.RLIMIT_NPROC, settings["num_processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def become_program(settings: dict[str, Any]) -> None:
    """Never returns."""
    set_limits(settings)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    os.execve(sys.executable, [sys.executable, "-I", "/tmp/program.py"], environment)


def wait_for(pid: int) -> int:
    """Exit status of a child, as a shell tells it; other children that end meanwhile are collected."""
    while True:
        done, status = os.wait()
        if done == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> None:
    settings = json.loads(sys.argv[1])
    with open(settings["program_fd"], encoding="utf-8", errors="surrogateescape") as file:
        program = file.read()
    uid = FIRST_UID + os.getpid() if os.getuid() == 0 else None
    try:
        checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
        enter_namespaces()
    except OSError as error:
        sys.exit(not_closed(error))
    first = os.fork()  # the first process of the new namespace: when it ends, the kernel kills all others there
    if first:
        os._exit(wait_for(first))
    try:
        build_root(settings["folder_bytes"], settings["folders"])
        with open("/tmp/program.py", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(program)
        os.chmod("/tmp/program.py", 0o644)
        drop_privileges(uid)
    except (OSError, KeyError) as error:
        os._exit(not_closed(error))
    child = os.fork()
    if child:
        os._exit(wait_for(child))
    try:
        become_program(settings)
    except (OSError, ValueError) as error:
        os._exit(not_closed(error))


def not_closed(error: Exception) -> int:
    print(f"the sandbox cannot be closed: {error}", file=sys.stderr, flush=True)
    return NOT_CLOSED


if __name__ == "__main__":
    main()
