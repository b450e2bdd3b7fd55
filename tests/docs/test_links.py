"""Links of README and docs name files that exist, so that a git host shows them; the site's build checks its own."""

from __future__ import annotations

import re

import pytest
from blocks import FENCE, PAGES, ROOT, text_of


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as git hosts and the site make them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page)))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if page.startswith("docs/"):
            assert target.is_relative_to(ROOT / "docs"), f"{link} is no part of the site"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(str(target.relative_to(ROOT))), link
