"""Extension of griffe, which reads docstrings: summaries have a docstring's first paragraph, not its first line."""

from typing import Any

import griffe


class FirstParagraphs(griffe.Extension):
    """Makes the first paragraph of each docstring one line."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            first, *rest = obj.docstring.value.split("\n\n", 1)
            obj.docstring.value = "\n\n".join([" ".join(first.split("\n")), *rest])
