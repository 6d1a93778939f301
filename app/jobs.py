"""Ingest jobs: their records, kept in SQLite so that a restart knows them, and the two workers that run them.

    queued -> parsing -> chunking -> embedding -> searchable -> precomputing -> precomputed | failed

One worker makes documents searchable, another compiles their KV; a slow compile never holds up the next document.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from app.errors import JobNotFoundError, NotReadyError, OverloadedError, StorageError

State = Literal["queued", "parsing", "chunking", "embedding", "searchable", "precomputing", "precomputed", "failed"]
Content = bytes | IO[bytes]
log = logging.getLogger(__name__)


@dataclass
class Item:
    """One thing to ingest; its bytes are in the job's folder under ``number`` until it is searchable."""

    number: int
    kind: Literal["file", "text", "chunks"]
    filename: str
    title: str | None = None
    document_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class DocumentResult:
    """What became of one document, or of a file that gave none; ``status`` is searchable, precomputed or failed."""

    filename: str
    status: str
    document_id: str | None = None
    title: str | None = None
    chunks: int = 0
    unchanged: bool = False
    error: dict[str, str] | None = None


@dataclass
class Job:
    """One call of ``/ingest``. ``done`` is set once nothing more will happen to it."""

    id: str
    collection: str
    items: list[Item]
    state: State = "queued"
    documents: list[DocumentResult] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    last_error: dict[str, str] | None = None
    cascaded: int = 0  # chunks compiled again because a neighbour of theirs was deleted or changed
    created_at: float = field(default_factory=time.time)
    finished_at: float | None = None

    def view(self) -> dict[str, Any]:
        """The job as clients see it."""
        counts = {"total": len(self.documents), "failed": sum(d.status == "failed" for d in self.documents)}
        counts["completed"] = sum(d.status in ("searchable", "precomputed") for d in self.documents)
        return {
            "id": self.id,
            "object": "ingest.job",
            "state": self.state,
            "collection": self.collection,
            "created_at": int(self.created_at),
            "finished_at": None if self.finished_at is None else int(self.finished_at),
            "documents": [dataclasses.asdict(d) for d in self.documents],
            "counts": counts,
            "progress": self.progress or None,
            "last_error": self.last_error,
            "cascaded": self.cascaded,
        }


class JobRecords:
    """Jobs on disk: ``folder/jobs.sqlite`` and one folder of uploaded bytes per job that still needs them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.uploads = folder / "uploads"
        self._lock = threading.Lock()
        self._sql = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
        self._sql.execute("PRAGMA journal_mode=WAL")
        self._sql.execute("PRAGMA synchronous=NORMAL")  # documents are the promise, not job records
        self._sql.execute(
            "CREATE TABLE IF NOT EXISTS jobs(id TEXT PRIMARY KEY, created REAL, ended INTEGER, body TEXT) STRICT"
        )
        self._sql.execute("CREATE INDEX IF NOT EXISTS jobs_created ON jobs(created)")

    def save(self, job: Job) -> None:
        body = json.dumps(dataclasses.asdict(job))
        with self._lock:
            self._sql.execute(
                "INSERT OR REPLACE INTO jobs VALUES(?, ?, ?, ?)",
                (job.id, job.created_at, job.finished_at is not None, body),
            )

    def load(self, job_id: str) -> Job | None:
        with self._lock:
            row = self._sql.execute("SELECT body FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return _job(row[0]) if row else None

    def latest(self, limit: int) -> list[Job]:
        with self._lock:
            rows = self._sql.execute("SELECT body FROM jobs ORDER BY created DESC LIMIT ?", (limit,)).fetchall()
        return [_job(row[0]) for row in rows]

    def unfinished(self) -> list[Job]:
        with self._lock:
            rows = self._sql.execute("SELECT body FROM jobs WHERE ended = 0 ORDER BY created").fetchall()
        return [_job(row[0]) for row in rows]

    def folder(self, job_id: str) -> Path:
        return self.uploads / job_id

    def put_bytes(self, job_id: str, number: int, data: Content) -> None:
        """Keep what item ``number`` is made of until it is searchable. Client names never become paths."""
        folder = self.folder(job_id)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / str(number)).open("wb") as f:
            if isinstance(data, bytes):
                f.write(data)
            else:
                shutil.copyfileobj(data, f)

    def forget_old(self, keep: int = 10_000) -> None:
        """Drop records of ended jobs beyond the latest ``keep``."""
        with self._lock:
            self._sql.execute(
                "DELETE FROM jobs WHERE ended = 1 AND id NOT IN (SELECT id FROM jobs ORDER BY created DESC LIMIT ?)",
                (keep,),
            )

    def bytes_of(self, job_id: str, number: int) -> bytes:
        return (self.folder(job_id) / str(number)).read_bytes()

    def drop_bytes(self, job_id: str) -> None:
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def close(self) -> None:
        with self._lock:
            self._sql.close()


Step = Callable[[Job, Callable[[], None]], Awaitable[None]]


class Jobs:
    """The bounded queue of jobs and its workers.

    ``ingest(job, changed)`` brings a job to ``searchable``; ``precompute(job, changed)``, if given, to ``precomputed``.
    Both call ``changed()`` after they changed the job and raise only on faults of ours.
    """

    def __init__(self, records: JobRecords, ingest: Step, precompute: Step | None, *, limit: int) -> None:
        self.records = records
        self.limit = limit
        self._steps = (ingest, precompute)
        self._queues: tuple[asyncio.Queue[Job], asyncio.Queue[Job]] = (asyncio.Queue(), asyncio.Queue())
        self._live: dict[str, Job] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._workers: list[asyncio.Task[None]] = []

    @property
    def running(self) -> int:
        """Jobs that have not ended."""
        return len(self._live)

    def start(self) -> None:
        """Start the workers; jobs that a crash or a stop cut short go on from the step they were in."""
        self.records.forget_old()
        for job in self.records.unfinished():
            if job.state in ("searchable", "precomputing"):
                self._enter(job, 1)
            elif self.records.folder(job.id).is_dir():
                job.documents.clear()
                self._enter(job, 0)
            else:
                self._finish(
                    job,
                    "failed",
                    "server_error",
                    "the service stopped before the upload was stored; send it again",
                )
        self._workers = [
            asyncio.create_task(self._work(step), name=f"ragblend-jobs-{step}") for step in (0, 1) if self._steps[step]
        ]

    async def submit(self, collection: str, items: Sequence[tuple[Item, Content]]) -> Job:
        """Accept a job; its bytes and record are on disk when this returns. Raises ``OverloadedError``."""
        if not self._workers:
            raise NotReadyError("background work is not running")
        if self.running >= self.limit:
            raise OverloadedError(f"{self.running} ingest jobs are waiting; try again soon", retry_after=5)
        job = Job(f"job_{uuid.uuid4().hex}", collection, [item for item, _ in items])
        self._live[job.id] = job  # counted against the limit before the first await

        def keep() -> None:
            for item, data in items:
                self.records.put_bytes(job.id, item.number, data)
            self.records.save(job)

        try:
            await asyncio.to_thread(keep)
        except (OSError, sqlite3.Error) as e:
            self._forget(job)
            raise StorageError(f"the upload could not be stored: {e}; free space in the data directory") from e
        except BaseException:
            self._forget(job)
            raise
        self._enter(job, 0)
        return job

    def get(self, job_id: str) -> Job:
        job = self._live.get(job_id) or self.records.load(job_id)
        if job is None:
            raise JobNotFoundError(f"no job {job_id!r}; GET /jobs lists them")
        return job

    def latest(self, limit: int) -> list[Job]:
        """Newest first."""
        return [self._live.get(job.id, job) for job in self.records.latest(limit)]

    async def wait(self, job: Job) -> None:
        """Until the job has ended."""
        if (ended := self._ended.get(job.id)) is not None:
            await ended.wait()

    async def close(self) -> None:
        """Stop the workers; what they were doing is taken up at the next start."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._workers.clear()
        await asyncio.to_thread(self.records.close)

    def _forget(self, job: Job) -> None:
        del self._live[job.id]
        self.records.drop_bytes(job.id)

    def _save(self, job: Job) -> None:
        """A record that cannot be written must not lose the work it is about."""
        try:
            self.records.save(job)
        except sqlite3.Error as e:
            log.error("the record of job %s (%s) could not be written: %s", job.id, job.state, e)

    def _enter(self, job: Job, step: int) -> None:
        self._live[job.id] = job
        self._ended.setdefault(job.id, asyncio.Event())
        if self._steps[step] is None:
            self._finish(job, "searchable")
        else:
            self._queues[step].put_nowait(job)

    def _finish(self, job: Job, state: State, code: str | None = None, message: str = "") -> None:
        job.state, job.finished_at = state, time.time()
        if code is not None:
            job.last_error = {"code": code, "message": message}
        self._live.pop(job.id, None)
        self._save(job)
        if (ended := self._ended.pop(job.id, None)) is not None:
            ended.set()

    async def _work(self, step: int) -> None:
        run = self._steps[step]
        assert run is not None
        while True:
            job = await self._queues[step].get()

            def changed(job: Job = job) -> None:
                self._save(job)

            try:
                await run(job, changed)
            except Exception:
                log.exception("job %s failed in state %s", job.id, job.state)
                # What is searchable stays searchable: only its speed is lost.
                state: State = "searchable" if step == 1 else "failed"
                message = "the server failed on this job; its log has the cause under the job's id"
                self._finish(job, state, "server_error", message)
                self.records.drop_bytes(job.id)
                continue
            if step == 0:
                await asyncio.to_thread(self.records.drop_bytes, job.id)
            if step == 0 and job.state == "searchable":
                self._enter(job, 1)
            else:
                self._finish(job, job.state)


def _job(body: str) -> Job:
    fields = json.loads(body)
    fields["items"] = [Item(**item) for item in fields["items"]]
    fields["documents"] = [DocumentResult(**document) for document in fields["documents"]]
    return Job(**fields)
