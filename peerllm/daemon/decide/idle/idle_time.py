"""How long a model stays loaded that nobody asks for. Pure: whoever asks says what time it is."""

from __future__ import annotations

from dataclasses import dataclass

FOR_GOOD_S = -1.0  # as clients say it: any number below 0
ON_DEMAND_S = 300.0  # of a model that a request started, where requests do not say
STARTING_S = 600.0  # a model that does not serve yet is given up only after so long


@dataclass(slots=True)
class IdleTime:
    """Of one deployment. The last request says how long it is kept; one that says nothing leaves it to `on_demand`.

    `on_demand`: a request started it, and no person. Times are of any clock that only rises.
    """

    on_demand: bool
    since: float  # nobody has asked since then
    keep_s: float | None = None  # as the last request said
    answers: int = 0  # under way

    @property
    def kept_s(self) -> float:
        """Seconds that it stays after the last answer; below 0: for good."""
        if self.keep_s is not None:
            return self.keep_s
        return ON_DEMAND_S if self.on_demand else FOR_GOOD_S

    def asked(self, keep_s: float | None, now: float) -> None:
        """A request for it came; `over` follows."""
        self.keep_s, self.since = keep_s, now
        self.answers += 1

    def over(self, now: float) -> None:
        """The answer to a request ended."""
        self.since = now
        self.answers -= 1

    def served(self, now: float) -> None:
        """It serves from now on."""
        self.since = max(self.since, now)

    def due(self, serving: bool) -> float | None:
        """When it is to be unloaded; None: not while nothing changes."""
        if self.answers or self.kept_s < 0:
            return None
        return self.since + (self.kept_s if serving else max(self.kept_s, STARTING_S))
