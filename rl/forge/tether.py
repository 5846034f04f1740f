"""`python -IS tether.py PARENT COMMAND …`: becomes COMMAND, which the kernel kills when its parent,
the process PARENT, ends in whatever way.

Linux sends the death signal when the *thread* that started the process ends, so the supervisor
starts children from its main thread only.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit("error: the kernel takes no death signal (prctl); run on Linux")
    if os.getppid() != parent:  # it ended before it could be tied to
        sys.exit(1)
    os.execvp(command[0], command)
