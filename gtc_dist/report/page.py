"""The page around the sections of a report: one file without scripts, fonts or anything else from a network."""

from collections.abc import Sequence
from html import escape

LINE_COLOURS = 6  # classes c0, c1, ... of lines
REPORT_MARKER = "<!-- gtc report -->"  # in the first lines: a file that a report may replace

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --text: #1c2127; --soft: #5b6570; --line: #d9dee4;
  --c0: #0b62b8; --c1: #c2500a; --c2: #17804d; --c3: #8b3fb0; --c4: #8a6d00; --c5: #b3194e; }
@media (prefers-color-scheme: dark) { :root { --back: #14181d; --card: #1d232a; --text: #e6e9ed; --soft: #a3adb8;
  --line: #36404b; --c0: #6cb2f7; --c1: #f59a57; --c2: #5fcf95; --c3: #cf9bf0; --c4: #dcbf4e; --c5: #f7849f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 16px; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .2em 0; }
h2 { font-size: 1.25rem; margin: 2em 0 .5em; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2em 0 .3em; }
p { margin: .4em 0 .8em; max-width: 80ch; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; margin: 1em 0; }
.tile { background: var(--card); border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 1.35rem; }
.charts, .lists { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 14px;
  margin: .8em 0; }
figure { margin: 0; padding: 10px 12px; background: var(--card); border-radius: 8px; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
.grid { stroke: var(--line); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 6 5; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .85rem; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 5px; }
.scroll { overflow-x: auto; margin: .5em 0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; }
.left td, .left th { text-align: left; }
.bars { width: 100%; table-layout: fixed; }
.bars th, .bars td { border: 0; padding: 2px 8px 2px 0; font-weight: 400; vertical-align: middle; }
.bars th { width: 46%; overflow-wrap: anywhere; }
.bars td:last-child { width: 21%; padding-right: 0; }
.bar i { display: block; height: 12px; border-radius: 3px; background: var(--c0); min-width: 1px; }
ol, ul { margin: .2em 0; padding-left: 1.6em; }
pre { overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; }
.beside { display: flex; flex-wrap: wrap; gap: 14px 24px; align-items: flex-start; }
.beside .scroll { max-width: 100%; } .beside figure { flex: 1 1 280px; max-width: 100%; }
@media (max-width: 600px) {
  .scroll th, .scroll td { padding: 4px 6px; font-size: .85rem; }
  .scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--back); min-width: 7em; }
}
"""
MARKS = "".join(
    f".c{n} {{ stroke: var(--c{n}); }} i.c{n}, .dot.c{n} {{ background: var(--c{n}); fill: var(--c{n}); }}\n"
    for n in range(LINE_COLOURS)
)


def html_page(title: str, sections: Sequence[str]) -> str:
    """The HTML text; sections are HTML."""
    return (
        f'<!doctype html>\n{REPORT_MARKER}\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{MARKS}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def html_section(title: str, *parts: str) -> str:
    """A section of the page; nothing if all its parts are empty."""
    filled = [part for part in parts if part]
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(filled) if filled else ""


def paragraph(words: str) -> str:
    """A paragraph; nothing for no words."""
    return f"<p>{escape(words)}</p>" if words else ""


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> str:
    """A table of texts, the first column to the left; nothing without rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="left"' if left else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Large numbers with what they are."""
    cells = "".join(f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in values)
    return f'<div class="tiles">{cells}</div>'


def side_by_side(*parts: str) -> str:
    """Parts side by side where the screen is wide enough; nothing without one."""
    return f'<div class="beside">{"".join(parts)}</div>' if any(parts) else ""


def chart_grid(*drawings: str) -> str:
    """Charts beside each other; nothing without one."""
    drawn = [each for each in drawings if each]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""
