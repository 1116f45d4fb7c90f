"""Run Python with signals blocked, for what must outlive a signal to all processes of a Slurm job step.

    python launch/block_signals.py TERM,USR1,USR2 -m accelerate.commands.launch ... train_ist.py --key value ...

The launcher would end its workers within 30 seconds of SIGTERM, and die of SIGUSR1. To ignore them is not enough, as it
sets handlers of its own. Workers inherit the block and end it when they can save (StopRequest in train_ist.py): a
signal that comes while they start waits until then.
"""

import os
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[f"SIG{name}"] for name in sys.argv[1].split(",")])
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
