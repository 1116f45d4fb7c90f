"""A run that is asked to stop."""

import signal


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGUSR1 or SIGUSR2; the loop looks at it between steps. A second Ctrl-C stops at once.

    Slurm sends a signal to all processes of a job step. The launcher must outlive it, so it has them blocked, and so
    have its workers (launch/block_signals.py): one that came early is received here.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def restore(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
