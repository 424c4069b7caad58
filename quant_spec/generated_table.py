"""Tables of the handbook that are written from code, between two markers of their page."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"


def with_table(page: str, table: str) -> str:
    """Return a page with the table between its markers; ValueError if it lacks one of them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"page: got none of {BEGIN} or {END}, wanted both")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def rewrite(path: Path, table: str) -> None:
    """Write the table into a page."""
    path.write_text(with_table(path.read_text(encoding="utf-8"), table), encoding="utf-8")
