"""`/admin`: what whoever runs the gateway may see and change, with a key of its own.

Changes of experts and of the router are put over the config file, for all replicas; each of them is
in the audit log.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from polymath.errors import ConfigError, DataError, InvalidKey, InvalidRequest, ModelNotFound
from polymath.experts import ExpertSettings
from polymath.gateway.gateway import Gateway
from polymath.gateway.keys import Budget, KeyRing, OffTopic
from polymath.gateway.reload import Reloader
from polymath.gateway.strict_json import strict_json_route
from polymath.router import RouterSettings

__all__ = ["admin_routes"]

ACTOR = "admin API"
MOST_SHOWN = 1000
MOST_DAYS = 90

Shown = Annotated[int, Query(ge=1, le=MOST_SHOWN)]
Count = Annotated[int, Field(ge=0)]


class NewExpert(BaseModel):
    """An expert to be added, or one in place of another."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=128)
    settings: dict[str, Any] = Field(description="As under `experts` in the config file.")


class NewKey(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=128)
    experts: tuple[str, ...] | None = None
    rpm: Count | None = None
    tpm: Count | None = None
    concurrent: Count | None = None
    budget: Budget | None = None
    allowed_domains: tuple[str, ...] | None = None
    off_topic: OffTopic | None = None
    keep_prompts: bool = False


async def _only_admin(request: Request) -> None:
    gateway: Gateway = request.app.state.gateway
    key = gateway.settings.server.admin_key
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    known = "" if key is None else key.get_secret_value()
    same = hmac.compare_digest(given.strip().encode(), known.encode())
    if not known or scheme.lower() != "bearer" or not same:
        raise InvalidKey("/admin needs `Authorization: Bearer` with `server.admin_key`.")


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _reloader(request: Request) -> Reloader:
    reloader: Reloader = request.app.state.reloader
    return reloader


Shared = Annotated[Gateway, Depends(_gateway)]
Reloading = Annotated[Reloader, Depends(_reloader)]


def admin_routes(max_depth: int) -> APIRouter:
    """The endpoints under `/admin`."""
    routes = APIRouter(
        prefix="/admin",
        dependencies=[Depends(_only_admin)],
        route_class=strict_json_route(max_depth),
    )
    routes.post("/reload", response_model=None)(reload)
    routes.get("/experts", response_model=None)(list_experts)
    routes.post("/experts", response_model=None)(add_expert)
    routes.delete("/experts/{name:path}", response_model=None)(remove_expert)
    routes.get("/router", response_model=None)(show_router)
    routes.put("/router", response_model=None)(swap_router)
    routes.delete("/router", response_model=None)(restore_router)
    routes.get("/decisions", response_model=None)(decisions)
    routes.get("/usage", response_model=None)(usage)
    routes.get("/audit", response_model=None)(audit)
    routes.get("/keys", response_model=None)(list_keys)
    routes.post("/keys", response_model=None)(create_key)
    routes.delete("/keys/{key}", response_model=None)(revoke_key)
    return routes


async def reload(reloader: Reloading, gateway: Shared) -> Response:
    """Take the config file as it is now, in every replica; if it is bad, nothing changes."""
    with _as_request():
        await reloader.reload(ACTOR)
    return _json({"status": "reloaded", "experts": list(gateway.catalog)})


async def list_experts(gateway: Shared) -> Response:
    """Experts with their settings, without secrets, and which of them the admin API changed."""
    changes = await gateway.overlay.changes()
    changed = {key[1] for key in changes if key[0] == "experts"}
    experts = [
        {
            "name": name,
            "changed": name in changed,
            "settings": expert.settings.model_dump(mode="json", exclude_defaults=True),
        }
        for name, expert in gateway.catalog.items()
    ]
    return _json({"object": "list", "data": experts})


async def add_expert(body: NewExpert, reloader: Reloading) -> Response:
    """Add an expert, or exchange it; requests in flight end on the old one."""
    _check_names(body.settings, ExpertSettings)
    with _as_request("settings"):
        await reloader.change(ACTOR, "add expert", ("experts", body.name), body.settings)
    return _json({"status": "added", "name": body.name})


async def remove_expert(name: str, reloader: Reloading, gateway: Shared) -> Response:
    """Take an expert away, even one of the config file."""
    if name not in gateway.settings.experts:
        raise ModelNotFound(f"There is no expert {name!r}.", param="name")
    with _as_request("name"):
        await reloader.change(ACTOR, "remove expert", ("experts", name), None)
    return _json({"status": "removed", "name": name})


async def show_router(gateway: Shared) -> Response:
    """The router's settings."""
    return _json(gateway.settings.router.model_dump(mode="json"))


async def swap_router(body: dict[str, Any], reloader: Reloading) -> Response:
    """Other settings or another folder for the router: the whole section of the config file."""
    _check_names(body, RouterSettings)
    with _as_request("router"):
        await reloader.change(ACTOR, "swap router", ("router",), body)
    return _json({"status": "swapped"})


async def restore_router(reloader: Reloading) -> Response:
    """The router of the config file again."""
    with _as_request("router"):
        was = await reloader.restore(ACTOR, "restore router", ("router",))
    return _json({"status": "restored" if was else "unchanged"})


async def decisions(
    gateway: Shared, limit: Shown = 100, expert: str | None = None, key: str | None = None
) -> Response:
    """The last requests: who answered, why, how it ended, what it cost."""
    found = [
        entry
        for entry in await gateway.decisions.recent(MOST_SHOWN)
        if expert in (None, entry["expert"]) and key in (None, entry["key"])
    ]
    return _json({"object": "list", "data": found[:limit]})


async def usage(gateway: Shared, days: Annotated[int, Query(ge=1, le=MOST_DAYS)] = 1) -> Response:
    """Requests, tokens and dollars of each key and expert, day by day (UTC)."""
    names = {record.id: record.name for record in await KeyRing(gateway.store).all()}
    today = datetime.now(UTC)
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for back in range(days):
        day = f"{today - timedelta(days=back):%Y-%m-%d}"
        for name, count in sorted((await gateway.store.usage(day)).items()):
            key, expert, what = name.rsplit("|", 2)
            place = {"day": day, "key": key, "name": names.get(key), "expert": expert}
            row = rows.setdefault((day, key, expert), place)
            row.update({"dollars": count / 1e9} if what == "nanodollars" else {what: count})
    return _json({"object": "list", "data": list(rows.values())})


async def audit(gateway: Shared, limit: Shown = 100) -> Response:
    """The last changes, the newest first."""
    return _json({"object": "list", "data": await gateway.audit.recent(limit)})


async def list_keys(gateway: Shared) -> Response:
    """All keys, without what opens them."""
    records = await KeyRing(gateway.store).all()
    return _json({"object": "list", "data": [record.about() for record in records]})


async def create_key(body: NewKey, gateway: Shared) -> Response:
    """A new key, which is shown this once."""
    unknown = [name for name in body.experts or () if name not in gateway.catalog]
    if unknown:
        raise InvalidRequest(f"There is no expert {unknown[0]!r}.", param="experts")
    key, record = await KeyRing(gateway.store).create(**body.model_dump(exclude_none=True))
    await gateway.audit.write(ACTOR, "create key", record.id, name=record.name)
    return _json({"key": key, **record.about()})


async def revoke_key(key: str, gateway: Shared) -> Response:
    """Make a key useless at once."""
    try:
        record = await KeyRing(gateway.store).revoke(key)
    except DataError as error:
        raise ModelNotFound(error.message, param="key") from None
    await gateway.audit.write(ACTOR, "revoke key", record.id, name=record.name)
    return _json(record.about())


@contextmanager
def _as_request(param: str | None = None) -> Iterator[None]:
    """What is wrong with a config as what is wrong with the request for it."""
    try:
        yield
    except ConfigError as error:
        raise InvalidRequest(error.message, param=param) from error


def _check_names(values: dict[str, Any], model: type[BaseModel]) -> None:
    """Refuse what the config file would refuse, before its text is touched."""
    if unknown := sorted(set(values) - set(model.model_fields)):
        names = ", ".join(sorted(model.model_fields))
        raise InvalidRequest(
            f"unknown: {', '.join(unknown)}; valid here: {names}", param=unknown[0]
        )


def _json(body: Any) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
