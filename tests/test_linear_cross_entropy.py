"""linear_cross_entropy: the conformance kit, and what is particular to it."""

from __future__ import annotations

from llmops.testing import suite
from llmops.testing.specs.linear_cross_entropy import SPEC

globals().update(suite(SPEC))
