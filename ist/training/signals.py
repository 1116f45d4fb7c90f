"""A run that is asked to stop."""

import signal


class StopRequest:
    """Set by a signal that asks a run to end; the loop looks at it between steps. A second Ctrl-C stops at once.

    SIGHUP is a terminal that is gone (ignored under nohup, as the shell has it), SIGXCPU a limit of CPU time.

    Slurm sends a signal to all processes of a job step. The launcher must outlive it, so it has them blocked, and so
    have its workers (launch/block_signals.py): one that came early is received here.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [number for number in self.SIGNALS if not (ignored and number == signal.SIGHUP)]
        self._previous = {number: signal.signal(number, self._receive) for number in heard}
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def restore(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
