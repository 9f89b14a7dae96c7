"""transformers: attn_implementation="llmops", and the rules by which llmops.patch() replaces the
modules of its models.

>>> from llmops.integrations.transformers import register
>>> register()
>>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="llmops")
"""

from __future__ import annotations

from llmops.integrations.transformers._model import patch_model, unpatch_model
from llmops.integrations.transformers.modules import rule
from llmops.integrations.transformers.registration import TESTED, register

__all__ = ["TESTED", "patch_model", "register", "rule", "unpatch_model"]
