"""Turns a spec into cases, one per check, target, dtype and sample, and those into pytest tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmops.backends import get
from llmops.dispatch import explain
from llmops.testing._checks import CHECKS
from llmops.testing._core import DTYPES, Make, OpSpec, Sample, Target, targets

TAGS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LOWER = (torch.float32, torch.bfloat16)


class Reach(NamedTuple):
    """Over what a check runs. A check not in REACH runs over every target, dtype and sample."""

    dtypes: tuple[torch.dtype, ...] = DTYPES[:1]
    samples: int = 3  # the first of the spec, which are so to choose
    # And the one of most elements, which is large enough for threads; those no interpreter has.
    largest: bool = False
    every_target: bool = False  # else the last target alone: the best instruction set


# Checks of the machinery around a kernel, which neither samples nor instruction sets change:
# compiling and exporting take a second each.
REACH = {
    "double_backward": Reach(),
    "compiles_fullgraph": Reach(),
    "func_grad": Reach(),
    "vmap": Reach(),
    "forward_mode_refused": Reach(samples=1),
    "autocast": Reach(_LOWER),
    "exports": Reach(samples=2),
    "from_threads": Reach(DTYPES, 2, largest=True),
    "after_fork": Reach(_LOWER, 1, largest=True),
    "far_strides": Reach(_LOWER, 3, every_target=True),
}


# Checks that use several threads. The others run on one: small calls spend their time waking and
# awaiting threads, and bitwise_repeatable, over the same targets, dtypes and samples, shows that
# one thread and several give the same bits.
THREADED = ("bitwise_repeatable", "from_threads", "after_fork")

# Checks of gradients and of nothing else.
GRADIENTS = ("gradients", "double_backward", "func_grad", "forward_mode_refused")


class Case(NamedTuple):
    check: str
    target: Target
    dtype: torch.dtype
    sample: Sample

    @property
    def id(self) -> str:
        return f"{self.target}-{TAGS[self.dtype]}-{self.sample.id}"

    def run(self, spec: OpSpec) -> None:
        """Raises AssertionError where the property does not hold."""
        threads = torch.get_num_threads()
        reason = self.refusal(spec)
        if reason is not None:
            self.refused(spec, reason)
            return
        if self.check not in THREADED:
            torch.set_num_threads(1)
        try:
            plain = self.target.forward_only(spec.name)
            sample = self.sample.without_gradients() if plain else self.sample
            CHECKS[self.check](spec, sample, self.target)
        finally:
            torch.set_num_threads(threads)

    def refusal(self, spec: OpSpec) -> str | None:
        """Why a backend that runs where others serve all there is does not serve the sample."""
        whole = self.target.whole(spec.name) and self.target.device == "cpu"
        if whole or spec.name not in get("cpu").PASSES:
            return None
        asked = explain(spec.fn, *self.sample.args, **self.sample.kwargs).call
        asked = asked._replace(device=self.target.device)
        reason: str | None = get(self.target.backend).serves(asked)
        return reason

    def refused(self, spec: OpSpec, reason: str) -> None:
        """What a backend says it does not serve, it refuses."""
        try:
            spec.fn(*self.sample.args, **self.sample.kwargs, backend=self.target.backend)
        except NotImplementedError:
            return
        raise AssertionError(f"{spec.name}: served, though {self.target} says: {reason}")


def checks_of(spec: OpSpec) -> list[str]:
    """The names of the checks that concern the spec."""
    unknown = set(spec.skip) - set(CHECKS)
    if unknown:
        raise ValueError(
            f"OpSpec {spec.name}: skip names {sorted(unknown)}; checks are {', '.join(CHECKS)}"
        )
    return [
        name
        for name in CHECKS
        if name not in spec.skip and (spec.rows or name != "nan_stays_in_row")
    ]


def cases(spec: OpSpec) -> Iterator[Case]:
    """Every case of every check, in the order of CHECKS."""
    # Made once and shared by all checks and targets; no check changes them.
    made: dict[tuple[str, torch.dtype], list[Sample]] = {}
    found = targets(spec.name, partial=True)
    for name in checks_of(spec):
        reach = REACH.get(name)
        for target in found if reach is None or reach.every_target else found[-1:]:
            if name in GRADIENTS and target.forward_only(spec.name):
                continue
            for dtype in DTYPES if reach is None else reach.dtypes:
                if spec.name in get("cpu").PASSES and not target.serves(spec.name, dtype):
                    continue
                key = (target.device, dtype)
                if key not in made:
                    made[key] = list(spec.samples(Make(dtype, target.device)))
                chosen = made[key]
                if reach is not None:
                    large = reach.largest and not target.interpreted
                    chosen = _some(chosen, reach._replace(largest=large))
                for sample in chosen:
                    yield Case(name, target, dtype, sample)


def _some(samples: list[Sample], reach: Reach) -> list[Sample]:
    some = samples[: reach.samples]
    if reach.largest:
        largest = max(samples, key=_elements)
        some += [largest] if not any(s is largest for s in some) else []
    return some


def _elements(sample: Sample) -> int:
    values = [*sample.args, *sample.kwargs.values()]
    return sum(v.numel() for v in values if isinstance(v, Tensor))


def suite(spec: OpSpec) -> dict[str, Callable[..., None]]:
    """Test functions by name, for `globals().update(suite(SPEC))` in a test module."""
    import pytest

    found: dict[str, Callable[..., None]] = {}
    every = list(cases(spec))
    for name in checks_of(spec):

        def test(case: Case) -> None:
            case.run(spec)

        test.__doc__ = CHECKS[name].__doc__
        test.__name__ = f"test_{spec.name}_{name}"
        parameters = [pytest.param(c, id=c.id) for c in every if c.check == name]
        if not parameters:  # a backend serves none of the dtypes that the check is sampled over
            continue
        found[test.__name__] = pytest.mark.parametrize("case", parameters)(test)
    if spec.schemas is not None:
        found[f"test_{spec.name}_opcheck"] = _opcheck_test(spec)
    return found


def _opcheck_test(spec: OpSpec) -> Callable[..., None]:
    import pytest

    assert spec.schemas is not None
    names = sorted(spec.schemas(Make(torch.float32)))

    def test(name: str) -> None:
        opcheck(spec, name)

    test.__name__ = f"test_{spec.name}_opcheck"
    test.__doc__ = opcheck.__doc__
    return pytest.mark.parametrize("name", names)(test)


def opcheck(spec: OpSpec, name: str) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch, by torch's own opcheck."""
    assert spec.schemas is not None
    namespace = getattr(torch.ops, spec.namespace)
    torch.library.opcheck(getattr(namespace, name).default, spec.schemas(Make(torch.float32))[name])
