"""What pages are put together from: the page around sections, charts with captions, figures' names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import resources
from string import Template

from matplotlib.figure import Figure

from fedsmoothlora.report import charts, tables
from fedsmoothlora.report.reading import Series
from fedsmoothlora.report.svg import inline

_WORDS = {
    "auroc": "AUROC",
    "macro_f1": "macro F1",
    "train_loss": "training loss",
    "train_loss_first": "training loss of the first step",
    "train_loss_last": "training loss of the last step",
    "own_accuracy": "own accuracy",
    "own_loss": "own loss",
    "samples": "rows",
    "bytes_up": "sent up",
    "bytes_down": "sent down",
    "seconds_round": "seconds of the round",
    "clients": "clients taking part",
    "refused": "uploads refused",
}


def document(*, title: str, headline: str, sections: Mapping[str, tuple[str, str]], footer: str) -> str:
    """A whole page as HTML, with links to its sections.

    Args:
        title: plain text.
        headline: HTML above the links.
        sections: title and HTML by id.
        footer: HTML below.
    """
    links = "\n".join(f'<li><a href="#{key}">{name}</a></li>' for key, (name, _) in sections.items())
    main = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-title">\n'
        f'<h2 id="{key}-title">{name}</h2>\n{body}\n</section>'
        for key, (name, body) in sections.items()
    )
    template = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=tables.escape(title),
        light=_variables(charts.LIGHT),
        dark=_variables(charts.DARK),
        headline=headline,
        links=links,
        main=main,
        footer=footer,
    )


def _variables(palette: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {code};" for name, code in palette.items())


def big(title: str, figure: str, below: str) -> str:
    """A number that matters: its name, the number as HTML, and what goes with it."""
    below = f'<dd class="change">{tables.escape(below)}</dd>' if below else ""
    return f'<div><dt>{title}</dt><dd class="figure">{figure}</dd>{below}</div>'


def chart(figure: Figure, name: str, title: str, description: str, caption: str = "") -> str:
    """A chart with its title. ``name`` is unique on the page; the description is for who does not see it."""
    below = f"<figcaption>{tables.escape(caption)}</figcaption>" if caption else ""
    svg = inline(figure, f"chart-{name.replace('_', '-')}", description)
    return f"<div><h3>{tables.escape(title)}</h3>\n<figure>{svg}{below}</figure></div>"


def grid(blocks: list[str]) -> str:
    """Blocks beside each other where there is room."""
    return '<div class="charts">\n' + "\n".join(blocks) + "\n</div>"


def told(label: str, series: Series, form: Callable[[float], str] = tables.decimals) -> str:
    """A curve in words, for people who do not see it."""
    finite = {round: value for round, value in sorted(series.items()) if math.isfinite(value)}
    if not finite:
        return f"{label}: no finite value"
    first, last = min(finite), max(finite)
    if first == last:
        return f"{label}: {form(finite[first])} at round {first}"
    return f"{label}: from {form(finite[first])} at round {first} to {form(finite[last])} at round {last}"


def word(name: str) -> str:
    """A figure's name as people say it."""
    return _WORDS.get(name, name.replace("_", " "))


def title(name: str) -> str:
    """The same with a capital letter."""
    words = word(name)
    return words[:1].upper() + words[1:]
