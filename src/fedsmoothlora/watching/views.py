"""The views of runs: each reads the files that changed, and gives a page."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from typing import Protocol
from urllib.parse import urlencode

from fedsmoothlora.errors import NoRunError, ReportError
from fedsmoothlora.reports.blocks import LivePage, Section
from fedsmoothlora.reports.following import FollowedMetrics, newest_metrics
from fedsmoothlora.reports.live import (
    LiveRun,
    comparison_page,
    list_page,
    listed_run,
    measured_sections,
    problem_page,
    run_page,
    unreadable_run,
)
from fedsmoothlora.reports.reading import Metrics, read_files
from fedsmoothlora.storage.progress import Progress, parse_progress
from fedsmoothlora.watching.confined import RunFiles, WatchedFolder

RUNS_ON_A_PAGE = 50
MOST_COMPARED = 10
_MEASURED = (
    "config.toml",
    "metrics.jsonl",
    "confusion.json",
    "environment.json",
    "evaluation.json",
    "stopped.json",
)
_MOVING = ("progress.json", "run.log")
_RUN_SECTIONS = ("progress", "curves", "privacy", "bytes", "clients", "refusals", "log")
_COMPARISON_SECTIONS = ("runs", "curves")


class View(Protocol):
    """A page of runs that may be in progress. Its methods are called by one thread at a time."""

    def stamp(self) -> Hashable:
        """A value that changes when the page may have changed; it takes little time."""

    def page(self) -> LivePage:
        """The page as it is now."""


class _Followed:
    """A run whose metrics are read as they are appended."""

    def __init__(self, folder: WatchedFolder, run: str) -> None:
        self._folder = folder
        self._run = run
        self._metrics = FollowedMetrics()

    def stamp(self) -> Hashable:
        try:
            with self._folder.open_run(self._run) as files:
                return _stamp(files)
        except NoRunError:
            return None

    def read(self) -> tuple[LiveRun, Hashable]:
        """The run, and the stamp of the files that its measured sections follow from.

        Raises ``ReportError`` if it is gone, or if a file of it is not valid.
        """
        with self._folder.open_run(self._run) as files:
            measured = files.stamp(*_MEASURED)
            if (file := files.open("metrics.jsonl")) is not None:
                with file:
                    self._metrics.read(file)
            else:
                self._metrics = FollowedMetrics()
            return _live_run(files, self._run, self._metrics.metrics), measured


class RunView:
    """The page of one run.

    Args:
        folder: the folder that is watched.
        run: the run's path below it.
    """

    def __init__(self, folder: WatchedFolder, run: str) -> None:
        self._run = run
        self._followed = _Followed(folder, run)
        self._events = "events/run?" + urlencode({"id": run})
        self._heading = run or folder.path.name
        self._drawn: tuple[Hashable, Sequence[Section]] = (None, [])

    def stamp(self) -> Hashable:
        return self._followed.stamp()

    def page(self) -> LivePage:
        try:
            run, measured = self._followed.read()
            if measured != self._drawn[0]:
                self._drawn = measured, measured_sections(run.recorded)
        except ReportError as error:
            return problem_page(
                self._heading,
                _problem(error),
                events=self._events,
                ids=_RUN_SECTIONS,
                is_below_list=bool(self._run),
            )
        return run_page(run, self._drawn[1], events=self._events, is_below_list=bool(self._run))


class ComparisonView:
    """Several runs side by side. Runs that cannot be read are left out.

    Args:
        folder: the folder that is watched.
        runs: the runs' paths below it.
    """

    def __init__(self, folder: WatchedFolder, runs: Sequence[str]) -> None:
        self._followed = [_Followed(folder, run) for run in runs]
        self._events = "events/compare?" + urlencode([("id", run) for run in runs])

    def stamp(self) -> Hashable:
        return tuple(one.stamp() for one in self._followed)

    def page(self) -> LivePage:
        found = []
        for one in self._followed:
            try:
                found.append(one.read()[0])
            except ReportError:
                continue
        if not found:
            return problem_page(
                "Runs side by side",
                "None of these runs can be read.",
                events=self._events,
                ids=_COMPARISON_SECTIONS,
                is_below_list=True,
            )
        return comparison_page(found, events=self._events)


class ListView:
    """One page of the list of runs.

    Args:
        folder: the folder that is watched.
        page: the number of the page, counted from 1.
    """

    def __init__(self, folder: WatchedFolder, page: int) -> None:
        self._folder = folder
        self._page = page
        self._events = "events/list?" + urlencode({"page": page})

    def stamp(self) -> Hashable:
        runs = self._folder.runs()
        return tuple(runs), tuple(_Followed(self._folder, run).stamp() for run in self._shown(runs))

    def page(self) -> LivePage:
        runs = self._folder.runs()
        rows = []
        for run in self._shown(runs):
            try:
                with self._folder.open_run(run) as files:
                    rows.append(listed_run(_newest(files, run)))
            except ReportError:
                rows.append(unreadable_run(run))
        return list_page(
            self._folder.path.name,
            rows,
            total=len(runs),
            page=self._page,
            pages=max(1, math.ceil(len(runs) / RUNS_ON_A_PAGE)),
            events=self._events,
        )

    def _shown(self, runs: Sequence[str]) -> Sequence[str]:
        return runs[(self._page - 1) * RUNS_ON_A_PAGE : self._page * RUNS_ON_A_PAGE]


def _newest(files: RunFiles, run: str) -> LiveRun:
    """A run with the metrics of its newest round only."""
    metrics = Metrics()
    if (file := files.open("metrics.jsonl")) is not None:
        with file:
            metrics = newest_metrics(file)
    return _live_run(files, run, metrics)


def _live_run(files: RunFiles, run: str, metrics: Metrics) -> LiveRun:
    recorded = read_files(files.path, metrics, files.opener)
    return LiveRun(id=run, recorded=recorded, progress=_progress(files), now=time.time())


def _stamp(files: RunFiles) -> Hashable:
    """Changes with the files, and with every minute of a run in progress, so that its silence is noticed."""
    stamp = files.stamp(*_MEASURED, *_MOVING)
    minute = time.time() // 60 if files.stamp("progress.json")[0] else None
    return stamp, minute


def _progress(files: RunFiles) -> Progress | None:
    content = files.read("progress.json")
    return None if content is None else parse_progress(content)


def _problem(error: ReportError) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]
