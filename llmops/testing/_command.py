"""The conformance kit as a command: an operator's spec in, a report and an exit code out."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from collections.abc import Iterator

import torch

from llmops.testing._checks import CHECKS
from llmops.testing._core import Make, OpSpec
from llmops.testing._suite import Case, cases, checks_of, opcheck

_SHOWN = 3  # failures shown of a check; the rest are counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec",
        nargs="+",
        help="MODULE:NAME of an llmops.testing.OpSpec, e.g. my_package.my_specs:SPEC (MODULE: "
        "every OpSpec in it), or the name of an llmops operator",
    )
    parser.add_argument(
        "--check",
        action="append",
        choices=[*CHECKS, "opcheck"],
        metavar="NAME",
        help=f"only this check (repeatable): {', '.join([*CHECKS, 'opcheck'])}",
    )
    parser.add_argument("--sample", default="", help="only samples whose id contains this")


def run(args: argparse.Namespace) -> int:
    """0: conforms; 1: does not, and the report says where."""
    # What one sees in a test run of one's own: the package in the current directory.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    verdicts = [report(spec, args.check, args.sample) for name in args.spec for spec in find(name)]
    return 0 if all(verdicts) else 1


def find(name: str) -> list[OpSpec]:
    """The specs that a name on the command line means."""
    from llmops.testing import specs

    module_name, _, attribute = name.partition(":")
    own = specs.every()
    if not attribute and name in own:
        return [own[name]]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"llmops conform: {name!r} is no llmops operator ({', '.join(own)}), and no module to "
            f"import from {os.getcwd()}: {error}"
        ) from None
    if attribute:
        found = [getattr(module, attribute, None)]
    else:
        found = [v for v in vars(module).values() if isinstance(v, OpSpec)]
    chosen = [v for v in found if isinstance(v, OpSpec)]
    if not chosen:
        got = f"; got {found[0]!r}" if attribute else ""
        raise ValueError(f"llmops conform: {name!r} is no OpSpec and no module that has one{got}")
    return chosen


def report(spec: OpSpec, only: list[str] | None = None, sample: str = "") -> bool:
    """Runs the checks and prints a line for each, its failures beneath; whether all passed."""
    by_check: dict[str, list[Case]] = {name: [] for name in checks_of(spec)}
    for case in cases(spec):
        if sample in case.sample.id:
            by_check[case.check].append(case)
    names = [n for n in (*by_check, "opcheck") if only is None or n in only]
    start, failed = time.perf_counter(), 0
    print(f"{spec.name}: {len(names)} checks, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads")
    for name in names:
        began = time.perf_counter()
        count, failures = 0, []
        runs = _opchecks(spec) if name == "opcheck" else _runs(spec, by_check[name])
        for id, error in runs:
            count += 1
            failures += [(id, error)] if error is not None else []
        failed += len(failures)
        seconds = time.perf_counter() - began
        verdict = "ok" if not failures else f"{len(failures)} FAILED"
        if not count:
            verdict = "nothing to run" if name != "opcheck" else "no schemas given"
        print(f"  {name:22} {count:5} cases  {seconds:6.1f} s  {verdict}", flush=True)
        for id, error in failures[:_SHOWN]:
            print(f"      {id}\n        {error}")
        if len(failures) > _SHOWN:
            print(f"      and {len(failures) - _SHOWN} more")
    for name, reason in spec.skip.items():
        print(f"  {name:22} skipped by the spec: {reason}")
    print(f"{spec.name}: {'conforms' if not failed else f'{failed} cases failed'}", end="")
    print(f" ({time.perf_counter() - start:.1f} s)")
    return failed == 0


def _runs(spec: OpSpec, chosen: list[Case]) -> Iterator[tuple[str, str | None]]:
    for case in chosen:
        yield case.id, _error_of(lambda case=case: case.run(spec))  # type: ignore[misc]


def _opchecks(spec: OpSpec) -> Iterator[tuple[str, str | None]]:
    if spec.schemas is None:
        return
    for name in sorted(spec.schemas(Make(torch.float32))):
        yield name, _error_of(lambda name=name: opcheck(spec, name))  # type: ignore[misc]


def _error_of(check: object) -> str | None:
    """What a check raises, in a line or a few; an operator that raises anything fails it."""
    assert callable(check)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            return kind + "\n        ".join(lines[:4])
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llmops.testing", description="Hold an operator to the conformance kit."
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
