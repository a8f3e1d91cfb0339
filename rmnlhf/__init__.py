"""Reward Modeling from Natural Language Human Feedback: from human critiques to a generative reward model."""

import ctypes
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the repository: notebooks run from here


def _keep_memory():
    """On a CPU: keep large freed blocks in this process. glibc would hand each back, and the kernel clear its pages anew for the
    next tensor: a large part of an update where page faults are dear, as in virtual machines. Does nothing beside an NVIDIA GPU,
    or where a MALLOC_ variable is set."""
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists() or any(k.startswith("MALLOC_") for k in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries
    if mallopt is not None:
        trim, pad, maps = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD (bytes), M_MMAP_MAX of malloc.h
        mallopt(trim, 2**31 - 1), mallopt(pad, 2**26), mallopt(maps, 0)


_keep_memory()

if "RMNLHF_HEADLESS" in os.environ:  # set by rmnlhf.notebook: a widget's progress would never reach the log
    import tqdm.auto

    tqdm.auto.tqdm, tqdm.auto.trange = tqdm.std.tqdm, tqdm.std.trange
