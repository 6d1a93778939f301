"""POST /ingest, its jobs, and the text of what was ingested."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from app.errors import BadRequestError, BodyTooLargeError, MalformedBodyError, NotReadyError
from app.estimate import Estimator, estimate
from app.ingest import items_of, open_collection
from app.jobs import Content, Item, Job, Jobs
from app.routes.common import ServiceOf, json_bytes, json_schema
from app.schema.body import check, parse_json, read_body, warning_header
from app.schema.ingest import FormFields, IngestDocument, IngestRequest
from app.service import Service
from retriever.clean import clean
from retriever.parse import formats, from_text

MIB = 1 << 20
router = APIRouter()


@router.post("/ingest", status_code=202, openapi_extra=json_schema(IngestRequest))
async def ingest(request: Request, service: ServiceOf, wait: bool = False) -> Response:
    """Take documents in: JSON (``documents`` with ``text`` or ``chunks``) or multipart files. 202 and a job; with
    ``wait=true`` the ended job."""
    jobs = _jobs(service)
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        job, unknown = await _submit_form(request, service, jobs)
    else:
        body, unknown = read_body(await json_bytes(request), IngestRequest, strict=service.settings.strict)
        job = await _submit(service, jobs, body.collection, items_of(body.documents))
    if wait:
        await _ended(jobs, job, service.settings.limits.request_s)
    headers = {"location": f"/jobs/{job.id}"} | warning_header(unknown)
    return JSONResponse(job.view(), 200 if job.finished_at is not None else 202, headers)


@router.post("/ingest/estimate", openapi_extra=json_schema(IngestRequest))
async def ingest_estimate(request: Request, service: ServiceOf) -> Response:
    """What ingesting and precomputing these JSON documents would take: tokens, GiB, minutes. Nothing is changed."""
    body, unknown = read_body(await json_bytes(request), IngestRequest, strict=service.settings.strict)
    items_of(body.documents)  # refuses what ingesting would refuse
    found = await asyncio.to_thread(_estimate, service, body.documents)
    return JSONResponse(found, headers=warning_header(unknown))


@router.get("/ingest/formats")
async def ingest_formats() -> dict[str, Any]:
    """File extensions that can be read, with their media types."""
    return {"object": "list", "data": [{"extension": e, "media_type": m} for e, m in formats().items()]}


@router.get("/jobs")
async def list_jobs(service: ServiceOf, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
    """The latest jobs, newest first."""
    return {"object": "list", "data": [job.view() for job in _jobs(service).latest(limit)]}


@router.get("/jobs/{job_id}")
async def get_job(service: ServiceOf, job_id: str) -> dict[str, Any]:
    """One job."""
    return _jobs(service).get(job_id).view()


@router.get("/v1/files/{file_id:path}/content", response_class=PlainTextResponse)
async def file_content(service: ServiceOf, file_id: str) -> Response:
    """The text of a document as it was indexed; citations point here. Never rendered: it is somebody else's text."""
    text = await asyncio.to_thread(service.retriever.document_text, file_id)
    headers = {"x-content-type-options": "nosniff", "content-security-policy": "default-src 'none'; sandbox"}
    return PlainTextResponse(text, headers=headers)


def _estimate(service: Service, documents: Sequence[IngestDocument]) -> dict[str, Any]:
    settings, store = service.settings, service.engine.store
    estimator = Estimator(service.keys, service.layout, store, settings)
    for d in documents:
        if d.chunks is not None:
            estimator.ready_made([clean(text) for text in d.chunks])
        else:
            name = d.filename or f"{d.title or d.id or 'document'}.txt"
            estimator.incoming([from_text(d.text or "", title=d.title, filename=name, document_id=d.id)])
    info = service.engine.info
    rate = service.rates.find(info.name, info.layout)
    return estimate(estimator.work, service.keys, store, settings, rate).view()


def _jobs(service: Service) -> Jobs:
    if service.jobs is None:
        raise NotReadyError("the service is stopping; try again soon")
    return service.jobs


async def _ended(jobs: Jobs, job: Job, limit_s: float) -> None:
    try:
        await asyncio.wait_for(jobs.wait(job), limit_s)
    except TimeoutError:
        return  # 202 with the state reached so far; the job goes on


async def _submit(service: Service, jobs: Jobs, collection: str, items: Sequence[tuple[Item, Content]]) -> Job:
    await asyncio.to_thread(open_collection, service.retriever, collection)
    return await jobs.submit(collection, items)


async def _submit_form(request: Request, service: Service, jobs: Jobs) -> tuple[Job, list[str]]:
    """Files of a multipart body; they go from disk to disk, never whole through memory."""
    limits = service.settings.limits
    try:
        form = await request.form(max_files=limits.multipart_parts, max_fields=limits.multipart_parts)
    except (MultiPartException, HTTPException) as e:
        text = e.message if isinstance(e, MultiPartException) else e.detail
        raise MalformedBodyError(f"the multipart body cannot be read: {text}") from e
    try:
        parts = form.multi_items()
        files = [value for _, value in parts if isinstance(value, UploadFile)]
        fields, unknown = _fields({k: v for k, v in parts if isinstance(v, str)}, service)
        if not files:
            raise BadRequestError("the form holds no files; send each as a part with a file name", param="files")
        if fields.title is not None and len(files) > 1:
            raise BadRequestError("title fits one file only", param="title")
        items: list[tuple[Item, Content]] = []
        for n, file in enumerate(files):
            if (file.size or 0) > limits.file_mib * MIB:
                raise BodyTooLargeError(f"file {(file.filename or '')[:200]!r} is larger than {limits.file_mib:g} MiB")
            item = Item(n, "file", file.filename or f"file-{n + 1}", fields.title, None, dict(fields.metadata or {}))
            items.append((item, file.file))
        return await _submit(service, jobs, fields.collection, items), unknown
    finally:
        await form.close()


def _fields(values: dict[str, Any], service: Service) -> tuple[FormFields, list[str]]:
    if "metadata" in values:
        try:
            values["metadata"] = parse_json(values["metadata"].encode())
        except MalformedBodyError as e:
            raise BadRequestError("metadata must be a JSON object", param="metadata") from e
    return check(values, FormFields, strict=service.settings.strict)
