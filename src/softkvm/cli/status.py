"""Exit statuses of `softkvm run`, in one place.

0..255  the status of the command in the guest, or that the guest wrote to the debug-exit port; 0 also for a plain power-off
255     the guest panicked, triple-faulted, or reset before its command had ended
124     time-out (as timeout(1))
125     softkvm's own error: bad input, something missing, or a bug (as env(1) and docker(1))
130     Ctrl-C; in general 128 + N for a signal N that we were sent, and 141 if the reader of our output has gone,
        and 159 if `--ioctl-filter` has killed the VMM (SIGSYS)
"""

from __future__ import annotations

import signal

SUCCESS = 0
GUEST_FAILED = 255
TIMED_OUT = 124
OWN_ERROR = 125
SIGNALLED = 128
INTERRUPTED = SIGNALLED + signal.SIGINT
BROKEN_PIPE = SIGNALLED + signal.SIGPIPE
KILLED = SIGNALLED + signal.SIGSYS
