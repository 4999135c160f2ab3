"""Runs a program that the kernel kills when its parent ends, however the parent ends.

Started as a script, `die_with_parent.py PARENT_PID PROGRAM ARGUMENTS...`, and replaced by the program. The signal is
tied to the thread that started the script: start it from the main thread, or from one that lives as long.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(parent_pid: int, command: list[str]) -> None:
    """Ask for the signal, then become the program. A parent that is gone by then would never send it."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() == parent_pid:
        os.execv(command[0], command)  # noqa: S606  # no shell is wanted


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
