"""How much each collection is recomputed: raised when its answers differ from full prefill's, lowered on trial.

A collection is the unit, not the combination of collections that a request names: a bad one cannot hide behind new
combinations, and there are never more levels than collections. A prompt of several has the highest of their levels.
Its comparison counts for each of them that would have been served so alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.guard.state import Level, State

if TYPE_CHECKING:
    from app.settings import GuardSettings

FULL = 1.0
LIMIT = 1000  # collections that are remembered while nothing is wrong with them
_MOST_RELAPSES = 5  # the wait before a trial doubles up to 32 times
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """One served answer against full prefill. ``kl``: of the first token, a lower bound in nats, where known."""

    agree: bool
    kl: float | None = None


@dataclass(frozen=True)
class Switch:
    """``collection`` went from the least ratio ``before`` to ``after``."""

    collection: str
    before: float
    after: float

    @property
    def direction(self) -> str:
        return "up" if self.after > self.before else "down"


class Levels:
    """The levels of all collections. ``switched`` is told of every change that comparisons or time bring."""

    def __init__(
        self,
        settings: GuardSettings,
        state: State,
        *,
        switched: Callable[[Switch], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self.state = settings, state
        self._switched, self._clock = switched, clock

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._clock()

    def least(self, collections: Iterable[str], *, trials: bool) -> tuple[float, str]:
        """The least ratio for a prompt of ``collections``, and why. With ``trials``, what is due steps down first."""
        worst = Level()
        for name in collections:
            if (level := self.state.collections.get(name)) is not None:
                if trials:
                    self._try_lower(name, level)
                worst = max(worst, level, key=lambda one: one.ratio)
        return worst.ratio, worst.why

    def note(self, collections: Iterable[str], found: Comparison, *, used: float, asked_at: float) -> None:
        """Count a comparison of an answer asked for at ``asked_at`` and blended at ratio ``used``; raise what falls
        below the floor."""
        window, levels = self._settings.window, {name: self._level(name) for name in collections}
        highest = max((level.ratio for level in levels.values()), default=0.0)
        for name, level in levels.items():
            if asked_at < level.since:
                continue  # before the last switch: it says nothing about the ratio of today
            if level.ratio < used <= highest:
                continue  # another collection wanted the ratio: alone, this one would have had a lower one
            level.recent = (level.recent + "01"[found.agree])[-window:]
            level.kl = [*level.kl, found.kl][-window:] if found.kl is not None else level.kl
            agreement = level.agreement or 0.0
            if len(level.recent) >= self._settings.least and agreement < self._settings.floor:
                self._raise(name, level, used, agreement)
            elif level.on_trial and len(level.recent) >= window:
                level.on_trial, level.relapses = False, 0

    def reset(self, name: str) -> bool:
        """Forget ``name``: it is served as asked again. False if nothing was known of it."""
        return self.state.collections.pop(name, None) is not None

    def _raise(self, name: str, level: Level, used: float, agreement: float) -> None:
        after = min((r for r in self._settings.ladder if r > max(level.ratio, used)), default=FULL)
        why = f"agreement {agreement:.2f} below {self._settings.floor:g}"
        log.warning(
            "guard: collection %r: %s over %d comparisons at ratio %g; %s", name, why, len(level.recent), used,
            "now full prefill" if after >= FULL else f"ratio raised to {after:g}",
        )  # fmt: skip
        level.relapses += level.on_trial
        self._switch(name, level, after, why)
        level.on_trial = False

    def _try_lower(self, name: str, level: Level) -> None:
        wait, now = self._settings.recover_after_s * 2 ** min(level.relapses, _MOST_RELAPSES), self.now()
        level.since = min(level.since, now)  # a clock that was put back
        if level.ratio == 0.0 or not wait or now - level.since < wait:
            return
        after = max((r for r in self._settings.ladder if r < level.ratio), default=0.0)
        log.warning("guard: collection %r: after %g s, ratio %g is tried again", name, wait, after)
        self._switch(name, level, after, level.why if after else "")
        level.on_trial = True

    def _switch(self, name: str, level: Level, after: float, why: str) -> None:
        switch = Switch(name, level.ratio, after)
        level.ratio, level.since, level.why = after, self.now(), why
        level.recent, level.kl = "", []
        self._switched(switch)

    def _level(self, name: str) -> Level:
        known = self.state.collections
        if name not in known and len(known) >= LIMIT:
            well = next((n for n, level in known.items() if level.ratio == 0.0), None)
            if well is not None:
                del known[well]
        return known.setdefault(name, Level())
