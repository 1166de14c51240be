"""How far a training is: by its steps alone, so that two runs are alike, unless its time runs short."""

import time

# Before this share of the time is over nothing is concluded: a machine may be busy for a moment.
LATE = 0.5


class Clock:
    """Counts the steps of a schedule; `done` goes from 0 to 1.

    At half the time, steps that won't fit are struck off and the rest of the schedule is run through faster, so that it
    still comes to its end; when the time is up it is over. Until then `done` depends on no clock.
    """

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds
        self.taken, self.stopped = 0, False
        self._start = time.monotonic()
        self._at, self._length = 0.0, float(steps)
        self._judged = False

    @property
    def done(self) -> float:
        """Share of the schedule that is over, 0 to 1."""
        return min(1.0, self._at / self._length) if self._length > 0 else 1.0

    def tick(self) -> None:
        """One step was taken."""
        self.taken += 1
        self._at += 1
        spent = time.monotonic() - self._start
        if self.done >= 1:
            return
        if spent >= self.seconds:
            self._at, self.stopped = self._length, True
        elif spent >= LATE * self.seconds and not self._judged:
            self._judged = True
            fit = max(1.0, (self.seconds - spent) * self.taken / spent)
            if fit < self._length - self._at:
                share = self.done
                self._length = fit / (1 - share)
                self._at, self.stopped = share * self._length, True

    def skip_to(self, share: float) -> None:
        """Leave out the steps before that share of the schedule."""
        self._at = max(self._at, share * self._length)

    def note(self) -> str:
        """What a ledger says of a training that its time cut short, with a comma before; else nothing."""
        if not self.stopped:
            return ""
        return f", stopped by time_limit_s after {self.taken} of {self.steps} steps: another run may differ"
