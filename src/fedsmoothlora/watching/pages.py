"""The application: addresses, and streams of the parts that changed."""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from functools import partial

import anyio
from anyio.to_thread import run_sync
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from fedsmoothlora.errors import ReportError
from fedsmoothlora.reports.blocks import LivePage
from fedsmoothlora.reports.rendering import live_parts, live_script, render_live
from fedsmoothlora.watching.access import Access, Guard
from fedsmoothlora.watching.confined import WatchedFolder
from fedsmoothlora.watching.views import MOST_COMPARED, ComparisonView, ListView, RunView, View

_log = logging.getLogger(__name__)

_MOST_VIEWS = 16
_MOST_STREAMS = 32
_HEARTBEAT = 15.0  # seconds
# Pages may take this share of one core, since runs train on the same machine.
_SHARE = 0.1


class Live:
    """A view that any number of readers follow; it is read and drawn once for all of them.

    Args:
        view: the view.
        every: seconds between two looks at the files.
        limiter: of the threads that draw.
    """

    def __init__(self, view: View, every: float, limiter: anyio.CapacityLimiter) -> None:
        self._view = view
        self._every = every
        self._limiter = limiter
        self._lock = anyio.Lock()
        self._next = 0.0
        self._stamp: Hashable = None
        self._page: LivePage | None = None
        self._parts: Mapping[str, Markup] = {}

    async def page(self) -> tuple[LivePage, Mapping[str, Markup]]:
        """The page and its parts as HTML, not older than two looks at the files."""
        async with self._lock:
            if self._page is None or time.monotonic() >= self._next:
                await run_sync(self._look, limiter=self._limiter)
            assert self._page is not None
            return self._page, self._parts

    def _look(self) -> None:
        began = time.monotonic()
        stamp = self._view.stamp()
        if self._page is None or stamp != self._stamp:
            self._stamp = stamp
            self._page = self._view.page()
            self._parts = live_parts(self._page)
        spent = time.monotonic() - began
        self._next = began + max(self._every, spent / _SHARE)


class Pages:
    """The pages of one folder.

    Args:
        folder: the folder.
        every: seconds between two looks at the files.
        is_over: whether the server ends, so that streams end too.
    """

    def __init__(
        self, folder: WatchedFolder, *, every: float = 1.0, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self._folder = folder
        self._every = every
        self._is_over = is_over
        self._is_run = folder.is_run
        self._views: OrderedDict[Hashable, Live] = OrderedDict()
        self._limiter = anyio.CapacityLimiter(1)
        self._streams = 0

    def app(self, access: Access) -> ASGIApp:
        """The application, behind the rules of access."""
        routes = []
        for path, find in (("run", self._run), ("compare", self._comparison), ("list", self._list)):
            if path != "list":
                routes.append(Route(f"/{path}", partial(self._show, find)))
            routes.append(Route(f"/events/{path}", partial(self._stream, find)))
        routes += [Route("/", self._home), Route("/live.js", _script)]
        handlers = {HTTPException: _refused, Exception: _failed}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), access)

    async def _home(self, request: Request) -> Response:
        return await self._show(self._run if self._is_run else self._list, request)

    async def _show(self, find: Callable[[Request], Live], request: Request) -> Response:
        page, parts = await find(request).page()
        return HTMLResponse(render_live(page, parts))

    async def _stream(self, find: Callable[[Request], Live], request: Request) -> Response:
        live = find(request)
        if self._streams >= _MOST_STREAMS:
            raise HTTPException(503, "Too many pages are open.")
        return StreamingResponse(self._counted(live), media_type="text/event-stream")

    async def _counted(self, live: Live) -> AsyncIterator[str]:
        self._streams += 1
        try:
            async for event in self.events(live):
                yield event
        finally:
            self._streams -= 1

    async def events(self, live: Live) -> AsyncIterator[str]:
        """Server-sent events with the parts that changed, until the server ends."""
        sent: Mapping[str, Markup] = {}
        last = time.monotonic()
        while not self._is_over():
            _, parts = await live.page()
            changed = {id: html for id, html in parts.items() if sent.get(id) != html}
            if changed:
                sent, last = parts, time.monotonic()
                yield f"event: parts\ndata: {json.dumps(changed)}\n\n"
            elif time.monotonic() - last >= _HEARTBEAT:
                last = time.monotonic()
                yield ": still here\n\n"
            await anyio.sleep(self._every)

    def live(self, key: Hashable, make: Callable[[], View]) -> Live:
        """The view of this key; views that nobody asked for lately are forgotten."""
        if key not in self._views:
            self._views[key] = Live(make(), self._every, self._limiter)
        self._views.move_to_end(key)
        while len(self._views) > _MOST_VIEWS:
            self._views.popitem(last=False)
        return self._views[key]

    def _run(self, request: Request) -> Live:
        run = request.query_params.get("id", "")
        self._check([run])
        return self.live(("run", run), lambda: RunView(self._folder, run))

    def _comparison(self, request: Request) -> Live:
        runs = list(dict.fromkeys(request.query_params.getlist("id")))
        if not 0 < len(runs) <= MOST_COMPARED:
            raise HTTPException(400, f"Choose 1 to {MOST_COMPARED} runs.")
        self._check(runs)
        return self.live(("compare", *runs), lambda: ComparisonView(self._folder, runs))

    def _list(self, request: Request) -> Live:
        text = request.query_params.get("page", "1")
        if not (text.isascii() and text.isdecimal() and len(text) < 7 and int(text) > 0):
            raise HTTPException(400, "There is no such page.")
        page = int(text)
        return self.live(("list", page), lambda: ListView(self._folder, page))

    def _check(self, runs: Sequence[str]) -> None:
        """Refuse paths that are not those of runs: they are not read at all."""
        for run in runs:
            try:
                with self._folder.open_run(run) as files:
                    known = None not in files.stamp("config.toml", "environment.json")
            except ReportError:
                known = False
            if not known:
                raise HTTPException(404, "There is no such run.")


async def _script(request: Request) -> Response:
    return Response(live_script(), media_type="text/javascript")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"{error.detail}\n", error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    _log.error("%s cannot be shown", request.url.path, exc_info=error)
    return PlainTextResponse("This page cannot be made; the terminal of the server says why.\n", 500)
