"""register(): transformers learns the name "llmops"; and whether it is the transformers we know."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor

from llmops.integrations.transformers.attention import _OF_OTHERS, SERVED, attention

NAME = "llmops"
# Of a model whose layers patch() replaced since they do not go by the interface.
OF_LAYERS = "llmops_layers"
TESTED = "5.24"


def register() -> None:
    """Makes attn_implementation="llmops" known to transformers, with every model of its that goes
    by the attention interface. Calling it again changes nothing.

    Raises:
        NotImplementedError: this transformers has no such interface, or one that has changed.
    """
    import transformers

    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise NotImplementedError(
            f"llmops: transformers {transformers.__version__} has no AttentionInterface and "
            "AttentionMaskInterface; 4.57 or later has"
        ) from error
    if (reason := why_not()) is not None:
        raise NotImplementedError(f"llmops: {reason}")
    AttentionInterface.register(NAME, attention)
    AttentionInterface.register(OF_LAYERS, attention)
    AttentionMaskInterface.register(NAME, mask)
    AttentionMaskInterface.register(OF_LAYERS, sdpa_mask)


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for "sdpa": bool, or None where the layer's is_causal says the same.

    Raises:
        NotImplementedError: the model's layers do not go by the interface. They would add this mask
            to their scores, and nothing would say that the result is wrong.
    """
    from transformers.masking_utils import sdpa_mask

    model = getattr(kwargs.get("config"), "model_type", None)
    if model is not None and not _goes_by_interface(model):
        raise NotImplementedError(
            f'attn_implementation="llmops": the layers of {model} do not go by transformers\' '
            "attention interface; load it without, and call llmops.patch(model)"
        )
    found: Tensor | None = sdpa_mask(*args, **kwargs)
    return found


def _goes_by_interface(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    name = model_type_to_module_name(model_type)
    module = sys.modules.get(f"transformers.models.{name}.modeling_{name}")
    return module is None or hasattr(module, "ALL_ATTENTION_FUNCTIONS")


# As in llmops/dispatch.py: a compiler takes the answer, and need not trace how it is found.
_goes_by_interface._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not() -> str | None:
    """Whether transformers has come to pass attention something that we would not know of."""
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    known = SERVED | _OF_OTHERS | {"kwargs"}
    more = sorted(set(inspect.signature(sdpa_attention_forward).parameters) - known)
    if more:
        return (
            f"transformers {transformers.__version__} passes attention {', '.join(more)}, which "
            f"was not known when this was written (for {TESTED}); attention is left alone"
        )
    return None


def version_note() -> str | None:
    import transformers

    version = transformers.__version__
    if version.startswith(TESTED + "."):
        return None
    return (
        f"transformers {version} is not {TESTED}, for which this was tested; each kind of module "
        "was compared with its replacement on small inputs, and left alone where they differ"
    )
