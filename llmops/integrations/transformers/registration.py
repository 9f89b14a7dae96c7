"""register(): transformers learns the name "llmops"; and whether it is the transformers we know."""

from __future__ import annotations

import inspect

from llmops.integrations.transformers.attention import _OF_OTHERS, SERVED, attention

NAME = "llmops"
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
    # A bool mask, or None where the layer's is_causal says the same: what the kernels like best.
    AttentionMaskInterface.register(NAME, sdpa_mask)


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
