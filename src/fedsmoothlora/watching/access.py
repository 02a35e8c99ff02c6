"""Access to the pages: the names of this machine that a request may use, and the token."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SHORTEST_TOKEN = 16
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]/@\s]+)(?::\d{1,5})?")
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, kw_only=True)
class Access:
    """The rules of access.

    Attributes:
        host: the address that is served, as it was given.
        is_local: it can be reached from this machine only.
        token: what a reader has to show once; None if nothing is asked.
        cookie: the name of the cookie that the reader is given in its place.
        session: the value of the cookie.
    """

    host: str
    is_local: bool
    token: str | None
    cookie: str = "fedsmoothlora-watch"
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def is_known_host(self, header: str) -> bool:
        """Whether a ``Host`` header names this machine.

        A page of another site whose name is made to point here (DNS rebinding) sends its own name.
        """
        found = _HOST.fullmatch(header)
        if found is None:
            return False
        name = found[1].strip("[]").lower().rstrip(".")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            local = {"localhost", self.host.lower()}
            return name in (local if self.is_local else local | _own_names())
        return address.is_loopback or not self.is_local

    def accepts_token(self, given: str) -> bool:
        """Whether this is the token, compared in constant time."""
        return self.token is not None and secrets.compare_digest(given.encode(), self.token.encode())

    def accepts_cookie(self, given: str | None) -> bool:
        """Whether a request with this cookie may read; always, where no token is asked."""
        if self.token is None:
            return True
        return given is not None and secrets.compare_digest(given.encode(), self.session.encode())


def checked_token(token: str | None, *, is_local: bool) -> str | None:
    """The token to ask for: the given one, or a new one where one is needed.

    Raises ``ConfigError`` if the given one is too short to be safe.
    """
    if token is None:
        return None if is_local else secrets.token_urlsafe(32)
    if len(token) < SHORTEST_TOKEN or not (token.isascii() and token.isprintable()):
        raise ConfigError(
            f"--token: give at least {SHORTEST_TOKEN} printable ASCII characters, or leave it out"
        )
    return token


class Guard:
    """Answers what may not be read, and adds the headers of safety to every answer.

    Args:
        app: the application behind it.
        access: the rules.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import MutableHeaders
        from starlette.requests import Request

        if scope["type"] != "http":
            raise RuntimeError(f"the page answers HTTP only, not {scope['type']}")

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        answer = self._answer(Request(scope)) or self._app
        await answer(scope, receive, send_safely)

    def _answer(self, request: Request) -> Response | None:
        """The answer to a request that does not reach the pages; None for all others."""
        from starlette.responses import PlainTextResponse, RedirectResponse

        access = self._access
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not access.is_known_host(hosts[0]):
            return PlainTextResponse("This name is not one of this server.\n", 421)
        if request.method != "GET":
            return PlainTextResponse("These pages can only be read.\n", 405, {"allow": "GET"})
        given = request.query_params.get("token")
        if given is not None and access.accepts_token(given):
            # To a fixed address: the token leaves the address bar, and no request chooses where to go.
            answer = RedirectResponse("/", 303)
            answer.set_cookie(access.cookie, access.session, httponly=True, samesite="strict", path="/")
            return answer
        if not access.accepts_cookie(request.cookies.get(access.cookie)):
            return PlainTextResponse(
                "Open the address that fedsmoothlora watch printed, with its token.\n", 401
            )
        return None


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, name.partition(".")[0]}
