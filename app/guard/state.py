"""What the guard must not forget when the server stops: one small JSON file in the data directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.errors import StartError
from app.files import DataFileError, read_model, replace_text

FILE = "guard.json"


class Level(BaseModel):
    """One collection: its prompts are recomputed at ``ratio`` at least (0: as asked, 1: full prefill).

    ``since``: seconds since the epoch when the ratio last changed. ``recent``: the last comparisons, ``1`` for those
    that agreed, oldest first; ``kl``: their first tokens' divergences in nats. ``on_trial``: stepped down, and not
    proven yet; ``relapses``: trials that failed in a row.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    since: float = 0.0
    why: str = ""
    recent: Annotated[str, Field(pattern="^[01]*$")] = ""
    kl: list[float] = []
    on_trial: bool = False
    relapses: Annotated[int, Field(ge=0)] = 0

    @property
    def agreement(self) -> float | None:
        """Share of the recent comparisons that agreed; ``None`` before the first."""
        return self.recent.count("1") / len(self.recent) if self.recent else None

    @property
    def mean_kl(self) -> float | None:
        return sum(self.kl) / len(self.kl) if self.kl else None


class State(BaseModel):
    """All collections that were compared. ``model`` is the layout digest of the model that answered."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = 1
    model: str
    collections: dict[str, Level] = {}


def read_state(folder: Path) -> State | None:
    """The state kept in ``folder``, ``None`` if there is none. Raises ``StartError`` naming the file and the fault."""
    remedy = "restore it, or remove it to serve every collection as asked"
    try:
        return read_model(folder / FILE, State, wrong="is not the guard's state", remedy=remedy)
    except DataFileError as e:
        raise StartError(str(e)) from e


def write_state(folder: Path, text: str) -> None:
    """Replace the state in ``folder`` by ``text``, the JSON of a ``State``; a crash leaves the old or the new file.

    Raises ``OSError``.
    """
    replace_text(folder / FILE, text)


def view(name: str, level: Level) -> dict[str, object]:
    """A collection as operators see it."""
    return {
        "collection": name,
        "least_ratio": level.ratio,
        "agreement": level.agreement,
        "kl": level.mean_kl,
        "comparisons": len(level.recent),
        "since": level.since or None,
        "why": level.why or None,
    }
