"""When things run: points of a sweep, their training, evaluation and timing."""

import os

# libgomp, the threads of PyTorch's packages for Linux, reads this as it loads. A thread that waits
# then gives its core away after some microseconds, not after milliseconds: another one of ours may
# need it, and one that has spun its time away is not let in when it has work.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
