"""API keys: who may ask an endpoint. Plain ASGI: no Ray.

A key is shown once, when it is made; a file keeps its SHA-256 under a name, a line each: ``alice: sha256:...``. Keys
are random and long, so that a plain hash is enough. The file is read again while the endpoint runs: a new line lets
somebody in, a line that is gone shuts somebody out.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import fsspec
from starlette.types import ASGIApp, Receive, Scope, Send

from banjoray.config.job import is_url
from banjoray.errors import ConfigError
from banjoray.serving.telemetry import Refuse

_LOG = logging.getLogger(__name__)
NONE = "none"
# No key is asked for here: who watches over an endpoint often has none.
OPEN_PATHS = ("/healthz", "/v2/health/live", "/v2/health/ready")
# Pages for people: there the refusal makes a browser ask for the key.
PAGE = "/ui"
# These change nothing, so that it does no harm if another site has a browser send them.
_HARMLESS = ("GET", "HEAD", "OPTIONS")
REREAD_S = 2.0
_LINE = re.compile(r"""([A-Za-z0-9][\w.-]{0,63}):\s*["']?sha256:([0-9a-f]{64})["']?\s*(?:#.*)?""", re.ASCII)
_HEAD = "# Names and hashes of API keys; a line that goes shuts its key out.\n"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


def hashed(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


def parse_keys(text: str, origin: str) -> dict[str, bytes]:
    """Name -> hash of every line; lines may be empty or comments.

    Raises ConfigError with the line's number, never with the line: somebody may have written a key there.
    """
    known: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.rstrip())
        if found is None:
            raise ConfigError(f"{origin} line {number}: needed NAME: sha256:HEX; banjoray keys new NAME writes it")
        if found[1] in known:
            raise ConfigError(f"{origin} line {number}: '{found[1]}' a second time; needed every name once")
        known[found[1]] = bytes.fromhex(found[2])
    return known


def _read(source: str) -> str:
    try:
        with fsspec.open(source, "rb") as file:
            return bytes(file.read()).decode("utf-8")
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{source}: can't be read as a file of keys ({type(error).__name__})") from None


class Keys:
    """The keys of a file, which is read again when a key is looked up `REREAD_S` after the last time.

    Raises ConfigError: a file that can't be read or parsed. Once there were keys, a file that can't be read any more
    is told to the log and changes nothing: to shut everybody out, empty it.
    """

    def __init__(self, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self._text = _read(source)
        self._known = parse_keys(self._text, source)
        self._read_at = clock()

    async def owner(self, key: bytes) -> str | None:
        """The name that a key stands under, None for an unknown one; it takes as long for each."""
        if self._clock() - self._read_at >= REREAD_S:
            self._read_at = self._clock()
            await asyncio.to_thread(self._follow)
        given = hashed(key)
        found = [name for name, known in self._known.items() if hmac.compare_digest(given, known)]
        return found[0] if found else None

    def _follow(self) -> None:
        try:
            text = _read(self._source)
            if text != self._text:
                self._text, self._known = text, parse_keys(text, self._source)
        except ConfigError as error:
            _LOG.error("the keys stay as they were: %s", error)


class Keyed:
    """ASGI middleware that lets requests with a known key through; others get 401, but on `OPEN_PATHS`.

    ``keys`` gives the keys of the replica, or None where none are asked for. A key is sent as ``Authorization: Bearer
    KEY``, as ``x-api-key: KEY``, or, by browsers, as the password of ``Authorization: Basic``. A browser adds that by
    itself, also to what a page of another site has it send, so such a request gets 403. The scope's "banjoray.key" is
    the name of the key that was sent.
    """

    def __init__(self, app: ASGIApp, keys: Callable[[], Keys | None], refuse: Refuse) -> None:
        self._app = app
        self._keys = keys
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it before its body is read."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        keys = self._keys()
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        if keys is None or path in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = key_in(scope["headers"])
        name = None if given is None else await keys.owner(given)
        foreign = name is not None and from_another_site(scope)
        if name is not None and not foreign:
            scope["banjoray.key"] = name
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif foreign:
            told = "a page of another site sent this; send Authorization: Bearer KEY, which no browser adds by itself"
            await self._refuse(scope, told, 403, {})(scope, receive, send)
        else:
            told = "a key is needed: send Authorization: Bearer KEY" if given is None else "this key is not known here"
            challenge = {"www-authenticate": _challenge(path, given)}
            await self._refuse(scope, told, 401, challenge)(scope, receive, send)


def _challenge(path: str, given: bytes | None) -> str:
    if path == PAGE or path.startswith(f"{PAGE}/"):
        return 'Basic realm="banjoray", charset="UTF-8"'
    return 'Bearer realm="banjoray"' + ', error="invalid_token"' * (given is not None)


def _first(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Each header's first value, by its name in small letters."""
    return dict(reversed([(name.lower(), value) for name, value in headers]))


def key_in(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key that a request's headers hold.

    ``x-api-key`` counts before a password: that may be for a gateway on the way.
    """
    found = _first(headers)
    scheme, _, token = found.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return token.strip()
    return found.get(b"x-api-key", _password(token) if scheme.lower() == b"basic" else None)


def _password(token: bytes) -> bytes:
    """What stands behind the first colon; nothing, which is nobody's key, if it can't be read."""
    try:
        return base64.b64decode(token.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return b""


def from_another_site(scope: Scope) -> bool:
    """Whether a browser sends its password with a request that a page of another site made.

    Browsers say where a request comes from: ``Sec-Fetch-Site`` on loopback and behind TLS, else ``Origin``. What is no
    browser says nothing, and sends no password that it was not given for this request.
    """
    found = _first(scope["headers"])
    by_itself = found.get(b"authorization", b"").lower().startswith(b"basic ") and b"x-api-key" not in found
    if not by_itself or scope.get("method") in _HARMLESS:
        return False
    site, origin = found.get(b"sec-fetch-site"), found.get(b"origin")
    if site is not None:
        return site not in (b"same-origin", b"none")
    return origin is not None and origin.partition(b"://")[2] != found.get(b"host")


def settled_keys(api_keys: str | None, host: str, where: str) -> str:
    """What ``api_keys`` means where ``host`` is listened on: `NONE`, or a file of keys, absolute and read once.

    Raises ConfigError: not said, and other machines can reach the host; a file that can't be used.
    """
    if api_keys is None:
        if not is_loopback(host):
            raise ConfigError(
                f"{where}.api_keys: missing, and other machines can reach {host}. Make a key with banjoray keys new "
                "NAME --file keys.yaml and say api_keys: keys.yaml; api_keys: none lets everybody ask"
            )
        return NONE
    if api_keys == NONE:
        return NONE
    source = api_keys if is_url(api_keys) else str(Path(api_keys).expanduser().absolute())
    Keys(source)
    return source


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def add_key(file: Path, name: str) -> str:
    """A new key under ``name``, whose hash is added to ``file``.

    Raises ConfigError: a name that is taken or has other letters, a file that can't be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"keys: found name {name!r}; needed letters, digits, '.', '_', '-', at most 64 of them")
    text = _read(str(file)) if file.exists() else _HEAD
    if name in parse_keys(text, str(file)):
        raise ConfigError(f"{file}: '{name}' has a key; revoke it, or give the new one another name")
    key = f"bj_{secrets.token_urlsafe(32)}"
    _write(file, f"{text}{'' if text.endswith(chr(10)) else chr(10)}{name}: sha256:{hashed(key.encode()).hex()}\n")
    return key


def revoke_key(file: Path, name: str) -> None:
    """Take the key under ``name`` out of ``file``; raises ConfigError if there is none."""
    text = _read(str(file))
    known = parse_keys(text, str(file))
    if name not in known:
        raise ConfigError(f"{file}: no key '{name}'; it has {', '.join(known) or 'none'}")
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if not ((found := _LINE.fullmatch(line.rstrip())) and found[1] == name)]
    _write(file, "".join(kept))


def _write(file: Path, text: str) -> None:
    """Replace the file at once, so that an endpoint never reads half of it; only its owner may read it."""
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        staged.touch(mode=0o600)
        staged.write_text(text, encoding="utf-8")
        staged.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: can't be written ({error.strerror})") from None
