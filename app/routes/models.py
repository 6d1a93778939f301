"""GET /v1/models: the served model, and one alias per collection for clients that cannot send extra fields."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from app.errors import ModelNotFoundError
from app.routes.common import ServiceOf
from app.service import Service

router = APIRouter()


@router.get("/v1/models")
async def list_models(service: ServiceOf) -> dict[str, Any]:
    """The model itself, then ``NAME:COLLECTION`` for every collection."""
    return {"object": "list", "data": await _models(service)}


@router.get("/v1/models/{model_id:path}")
async def get_model(service: ServiceOf, model_id: str) -> dict[str, Any]:
    """One model or alias."""
    for model in await _models(service):
        if model["id"] == model_id:
            return model
    raise ModelNotFoundError(f"no model {model_id[:200]!r}; GET /v1/models lists them")


async def _models(service: Service) -> list[dict[str, Any]]:
    name = service.settings.served_name
    base: dict[str, Any] = {"object": "model", "created": 0, "owned_by": "ragblend"}
    models = [{"id": name} | base | {"max_model_len": service.engine.info.max_context}]
    for c in await asyncio.to_thread(service.retriever.collections):
        details = {
            "created": int(c.created_at),
            "parent": name,
            "collection": c.name,
            "documents": c.documents,
        }
        models.append({"id": f"{name}:{c.name}"} | base | details)
    return models
