"""Reads request bodies into what was wanted, or says which field is wrong.

Every field of the E2B creation body is known here: it is honoured, or refused by name where it
would change what the caller gets. Nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from rorqual.sandbox.contract import Limits, Network
from rorqual.sandbox.control.failures import AnswerError, bad_request

MAX_BODY_BYTES = 256 << 10
DEFAULT_LEASE_S = 300.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_TOKEN = re.compile(r"[\x21-\x7e]{1,255}")
_NONE_OUT = {"0.0.0.0/0", "::/0"}
_REFUSED = ("mcp", "iam", "volumeMounts")
_KNOWN = {
    "templateID",
    "timeout",
    "autoPause",
    "autoPauseMemory",
    "autoResume",
    "secure",
    "allow_internet_access",
    "network",
    "metadata",
    "envVars",
    "rorqual",
    *_REFUSED,
}
_EXTENSION = {"substrate", "isolation", "limits", "readOnly"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A sandbox somebody asked for."""

    template: str = "base"
    substrate: str = "container"
    isolation: str | None = None
    limits: Limits = field(default_factory=Limits)
    network: Network | None = None
    read_only: bool = False
    lease_s: float = DEFAULT_LEASE_S
    pause_on_timeout: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    client_token: str | None = None

    @property
    def need_bytes(self) -> int:
        """The most memory it may take, files included."""
        return self.limits.memory_bytes + self.limits.disk_bytes

    def shape(self) -> str:
        """Equal for sandboxes that are interchangeable before they are used."""
        parts = (
            self.template,
            self.substrate,
            self.isolation,
            self.limits,
            self.network,
            self.read_only,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def digest(self) -> str:
        """Equal for creations that ask for the same."""
        return hashlib.sha256(repr((self, "")).encode()).hexdigest()


async def json_body(request: Request, *, limit: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The body as a JSON object; an empty one is {}."""
    return parse_object(await raw_body(request, limit))


async def raw_body(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes."""
    held = bytearray()
    async for piece in request.stream():
        held += piece
        if len(held) > limit:
            raise AnswerError(
                status=413, error_code="too_large", message=f"the body is over {limit} bytes"
            )
    return bytes(held)


def parse_object(body: bytes) -> dict[str, Any]:
    """JSON that must be an object; whatever else is the caller's mistake."""
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request("the body is not a JSON object")
    return value


def creation(body: dict[str, Any], token: str | None) -> Wanted:
    """What a creation asks for.

    Raises:
        AnswerError: a field is unknown, of the wrong type, out of range or not to be had.
    """
    if unknown := sorted(set(body) - _KNOWN):
        raise bad_request(f"unknown field {unknown[0]!r}")
    for name in _REFUSED:
        if body.get(name):
            raise bad_request(f"{name} is not supported", "unsupported")
    if token is not None and not _TOKEN.fullmatch(token):
        raise bad_request("Idempotency-Key is not 1-255 visible characters")
    template = text(body, "templateID", "base")
    if not _NAME.fullmatch(template):
        raise bad_request(f"templateID {template[:140]!r} is not a template's name")
    extension = mapping(body, "rorqual")
    if unknown := sorted(set(extension) - _EXTENSION):
        raise bad_request(f"unknown field 'rorqual.{unknown[0]}'")
    return Wanted(
        template=template,
        substrate=text(extension, "substrate", "container"),
        isolation=text(extension, "isolation", "") or None,
        limits=_limits(mapping(extension, "limits")),
        network=_network(body),
        read_only=flag(extension, "readOnly"),
        lease_s=number(body, "timeout", DEFAULT_LEASE_S),
        pause_on_timeout=flag(body, "autoPause"),
        metadata=_texts(body, "metadata"),
        env=_texts(body, "envVars"),
        client_token=token,
    )


def _limits(given: dict[str, Any]) -> Limits:
    known = set(Limits.__dataclass_fields__)
    if unknown := sorted(set(given) - known):
        raise bad_request(f"unknown field 'rorqual.limits.{unknown[0]}'; known: {sorted(known)}")
    for name, value in given.items():
        number({name: value}, name, 0.0)
        if name not in ("cpus", "exec_s") and not isinstance(value, int):
            raise bad_request(f"rorqual.limits.{name} is not a whole number")
        if value > 1 << 50:
            raise bad_request(f"rorqual.limits.{name} is too large")
    return Limits(**given)


def _network(body: dict[str, Any]) -> Network | None:
    flag(body, "allow_internet_access")
    network = mapping(body, "network")
    for name, value in network.items():
        if name == "allowOut":
            continue
        if name == "denyOut" and isinstance(value, list) and set(map(str, value)) <= _NONE_OUT:
            continue  # nothing is let out that is not allowed by name
        if name == "allowPublicTraffic" and value in (True, False, None):
            continue  # no port is reachable from outside this machine either way
        if value:
            raise bad_request(f"network.{name} is not supported", "unsupported")
    allow = network.get("allowOut") or []
    if not isinstance(allow, list) or not all(isinstance(rule, str) for rule in allow):
        raise bad_request("network.allowOut is not a list of names")
    return Network(allow=tuple(allow)) if allow else None


# -- fields of JSON objects
def text(body: dict[str, Any], name: str, default: str) -> str:
    """A string field."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise bad_request(f"{name} is not a string")
    _encodable(value, name)
    return value


def _encodable(value: str, name: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad_request(f"{name} holds half a surrogate pair") from None


def flag(body: dict[str, Any], name: str, default: bool = False) -> bool:
    """A true-or-false field."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad_request(f"{name} is not true or false")
    return value


def number(body: dict[str, Any], name: str, default: float) -> float:
    """A finite number field, not negative."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        raise bad_request(f"{name} is not a number from 0")
    return float(value)


def mapping(body: dict[str, Any], name: str) -> dict[str, Any]:
    """An object field."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_request(f"{name} is not an object")
    return value


def _texts(body: dict[str, Any], name: str) -> dict[str, str]:
    value = mapping(body, name)
    for key, item in value.items():
        if not isinstance(item, str):
            raise bad_request(f"{name}.{key[:60]} is not a string")
        _encodable(key, name)
        _encodable(item, f"{name}.{key[:60]}")
    if name == "envVars" and any("\0" in f"{k}{v}" or "=" in k or not k for k, v in value.items()):
        raise bad_request("envVars holds a zero byte, or a name that is empty or holds '='")
    return value


def texts(body: dict[str, Any], name: str) -> dict[str, str]:
    """An object of strings."""
    return _texts(body, name)
