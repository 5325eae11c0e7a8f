"""quarantine.csv of a run: images left out, unreadable at the start or lost on the way."""

from __future__ import annotations

from vitreous.data.problems import shown
from vitreous.data.quarantine import COLUMNS, Quarantined
from vitreous.train.engine.session import Session
from vitreous.train.records.run_folder import Run, read_rows

FILE = "quarantine.csv"


def lost_images(session: Session) -> list[Quarantined]:
    """Images that could be read at the start and no longer when their batch was made."""
    return [
        Quarantined(batches.name(i), batches.images.target.class_text(i, session.data.classes), part, reason)
        for part, batches in {"train": session.train, **session.tests}.items()
        for i, reason in sorted(batches.lost.items())
    ]


def gather_lost(session: Session) -> None:
    """Collective: tell the first process which images others could not read."""
    loaders = [session.train, *session.tests.values()]
    for losses in session.team.gather([(loader.lost, loader.missing) for loader in loaders]):
        for loader, (lost_there, missing) in zip(loaders, losses, strict=True):
            loader.lost, loader.missing = loader.lost | lost_there, loader.missing | missing


def write_quarantine(session: Session, run: Run) -> list[str]:
    """Add to quarantine.csv what is not in it yet; returns a line if images were newly lost."""
    earlier = read_rows(run.folder / FILE)
    late = [bad for bad in lost_images(session) if bad.cells() not in earlier]
    rows = [bad.cells() for bad in session.data.quarantined]
    new = [row for row in rows if row not in earlier] + [bad.cells() for bad in late]
    if new:
        run.table(FILE, COLUMNS, [*earlier, *new])
    if not late:
        return []
    return [
        f"Quarantined: {len(late)} images more, lost since the start, such as {shown(late[0].file)}: {shown(late[0].reason)}; "
        f"see {FILE}. The run goes on without them, so another run will not repeat it exactly."
    ]
