"""Colours and sizes of charts."""

LIGHT = {
    "paper": "#fefefe",
    "ink": "#16242c",
    "mid": "#05090b",
    "quiet": "#52636d",
    "line": "#d3dce1",
    "accent": "#1b6a94",
    "client": "#8fa3af",
    "second": "#b3541e",
    "third": "#2b7d5c",
    "fourth": "#7d4a9c",
    "fifth": "#7c6a12",
    "sixth": "#a3285f",
}
"""Colours by name on a light page; every one is different, and the name is the CSS variable's."""

DARK = {
    "paper": "#11181d",
    "ink": "#e7eef2",
    "mid": "#05090b",
    "quiet": "#a3b3bd",
    "line": "#2f3c45",
    "accent": "#6dbde6",
    "client": "#6b7d88",
    "second": "#f0a06c",
    "third": "#6ccda4",
    "fourth": "#c9a1e0",
    "fifth": "#d6c463",
    "sixth": "#ee93bb",
}
"""The same names on a dark page."""

WIDTH = 4.2
"""Width of every chart in inches: small, so that text stays readable where a phone scales the chart down."""
