from llmops.testing import suite
from llmops.testing.specs.attention import SPEC

globals().update(suite(SPEC))
