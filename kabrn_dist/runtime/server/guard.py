"""Who may ask: names of the server, pages of other sites, and the token; and headers that every answer has."""

from __future__ import annotations

import hmac
import re
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kabrn_dist.runtime.server.answer_response import error_response
from kabrn_dist.runtime.server.errors import RequestError
from kabrn_dist.runtime.server.settings import ServerSettings

# A name or an address, and a port: nothing that two readers could take for two names.
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE | re.ASCII)

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class RequestGuard:
    """Refuses what is not for this server, before anything reads it.

    Args:
        app: What is guarded.
        settings: The server's names and its token.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._token = settings.token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except RequestError as error:
            await error_response(error)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._settings.is_loopback and not self._is_known(host):
            # A page of another site whose name has been made to lead here (DNS rebinding).
            raise RequestError(
                f"Host: {host[:100]!r} is no name of this server; use http://localhost, or add it with --allow-host",
                status=403,
                code="unknown_host",
            )
        origin = headers.get("origin")
        if not self._token and origin is not None and origin.lower() not in _own_origins(host):
            raise RequestError(
                "Origin: pages of other sites may not use this server", status=403, code="foreign_origin"
            )
        if self._token and path.startswith("/v1"):
            self._check_token(headers.get("authorization", ""))

    def _check_token(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        # Also for another scheme, so that the time tells nothing.
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._token)
        if scheme.lower() != "bearer" or not same:
            raise RequestError(
                "Authorization: the token is missing or another one; send 'Bearer TOKEN', with the server's --token",
                status=401,
                code="invalid_api_key",
            )

    def _is_known(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].lower().strip("[]")
        if name == "localhost" or name in (self._settings.host, *self._settings.hosts):
            return True
        try:
            return ip_address(name).is_loopback
        except ValueError:
            return False


def _own_origins(host: str) -> tuple[str, str]:
    # A server in front may speak TLS.
    return f"http://{host.lower()}", f"https://{host.lower()}"
