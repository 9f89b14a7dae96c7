"""cases/model.py at the sizes at which people prompt and train: 512 tokens, steps of 4 x 512. A row
takes minutes, so this is measured only where it is named: `llmops bench model_long`.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmops.bench.cases import model
from llmops.bench.harness import Case


def cases(quick: bool) -> Iterator[Case]:
    sizes = model.Sizes() if quick else model.Sizes(prompt=512, batch=4, cached=512, new=32)
    for case in model.cases(quick, sizes):
        case.op = "model_long"
        yield case
