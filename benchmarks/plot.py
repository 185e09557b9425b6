"""Ratios as bars in an SVG, by plain code: readable on light and on dark pages."""

from collections.abc import Sequence
from html import escape
from typing import Any

from benchmarks.contestants import NAMES

_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600 } .small { font-size: 11px; fill: #57606a }
  .bar { fill: #2f81b7 } .low { fill: #8a6fb8 } .one { stroke: #57606a; stroke-dasharray: 4 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9aa4af } .bar { fill: #58a6d6 } .low { fill: #b198dd } .one { stroke: #9aa4af }
  }
"""
_LEFT, _WIDTH, _ROW = 330, 380, 24


def ratios_svg(contests: Sequence[dict[str, Any]]) -> str:
    """Bars of real tokens/s against each peer, a group for each contest; the dashed line is 1: as fast as the peer."""
    most = max(1.0, *(row["rate"] for found in contests for row in found["ratios"]))
    scale = _WIDTH / most
    parts: list[str] = []
    y = 30
    parts.append(f'<text class="title" x="10" y="{y - 8}">Real tokens/s, as a multiple of the peer\'s</text>')
    for found in contests:
        y += 26
        parts.append(f'<text class="small" x="10" y="{y - 6}">in {escape(found["job"]["precision"])}</text>')
        top = y
        for row in found["ratios"]:
            low = row["ours"] == "sft-play-low"
            label = f"{'low memory, ' if low else ''}against {NAMES[row['peer']]}"
            parts.append(f'<text class="small" x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>')
            width = row["rate"] * scale
            parts.append(
                f'<rect class="{"low" if low else "bar"}" x="{_LEFT}" y="{y + 2}" width="{width:.1f}" height="{_ROW - 6}" rx="2"/>'
            )
            parts.append(f'<text x="{_LEFT + width + 6:.1f}" y="{y + 15}">{row["rate"]:.2f}×</text>')
            y += _ROW
        one = _LEFT + scale
        parts.append(f'<line class="one" x1="{one:.1f}" y1="{top - 2}" x2="{one:.1f}" y2="{y}"/>')
    size = f'width="{_LEFT + _WIDTH + 70}" height="{y + 14}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
