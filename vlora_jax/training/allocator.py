"""Main memory on Linux: keep a step's large buffers instead of giving them back after every step."""

import os
import platform
import sys

TUNABLES = {
    "glibc.malloc.hugetlb": 1,
    "glibc.malloc.mmap_threshold": 2**32,
    "glibc.malloc.trim_threshold": 2**34,
    "glibc.malloc.top_pad": 2**28,
}


def keep_large_buffers() -> None:
    """Start this process again, under the same number, with glibc told to keep what XLA frees.

    XLA's CPU backend allocates its temporaries anew for every step; glibc returns them to the kernel, which clears
    every page when it is touched again: up to a third of a step. The settings are read when a process starts.
    Does nothing where GLIBC_TUNABLES is set already (also to nothing), or there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)
