"""The words of a line of the table: state with how far it came, how long ago, the data by its short name."""

from __future__ import annotations

import math
from datetime import datetime

from tltrain.core.output.console import brief
from tltrain.runs.listing.lines import RunLine


def state_of(line: RunLine) -> str:
    """The state, and how much is done where it is not finished: stopped 43 %."""
    return line.state if line.state == "finished" or math.isnan(line.done) else f"{line.state} {100 * line.done:.0f} %"


def data_name(source: str) -> str:
    """A data source by its last name: photos for folder:/data/photos, DTD for torchvision:DTD."""
    return (source.partition(":")[2] or source).rstrip("/").rpartition("/")[2]


def ago(when: float, now: float) -> str:
    """How long ago: 5 min ago, 3 h ago, or the day. Both in seconds since the epoch."""
    if math.isnan(when):
        return ""
    age_s = now - when
    if age_s < 90:
        return "now"
    if age_s < 5400:
        return f"{age_s / 60:.0f} min ago"
    if age_s < 86400:
        return f"{age_s / 3600:.0f} h ago"
    day = datetime.fromtimestamp(when)
    return f"{day.day} {day:%b}" if day.year == datetime.fromtimestamp(now).year else f"{day.day} {day:%b %Y}"


def short_duration(seconds: float) -> str:
    """A duration in at most seven characters: 48 s, 3:20, 2:05:00."""
    return brief(seconds) if math.isfinite(seconds) else ""


def cut(text: str, width: int) -> str:
    """A text that fits: what is too long loses its middle, so that its end, which tells runs apart, stays."""
    if len(text) <= width:
        return text
    keep = max(1, width - 1)
    return f"{text[: keep // 3]}\u2026{text[len(text) - (keep - keep // 3) :]}"
