"""`llmops demo`: text from a real model, its speed and each op's beside plain PyTorch."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

PROMPT = "The three most important ideas in computer science are"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", help="as for llmops generate")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per run (default 48)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")


def run(arguments: argparse.Namespace) -> int:
    from llmops import report
    from llmops.bench import cases, command

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(report.text(), end="\n\n", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        _speed(arguments.model, dtype, arguments.tokens)
    print("\nEach op beside torch, quick:", flush=True)
    bench = argparse.ArgumentParser()
    command.add_arguments(bench)
    ops = [n for n in cases.names() if n not in (*cases.LAST, "overhead", "scaling")]
    return command.run(bench.parse_args(["--quick", "--plain", *ops]))


def _speed(name: str, dtype: torch.dtype, tokens: int) -> None:
    """Greedy text from our kernels, then decode and prefill rates of both, run in turn."""
    import llmops
    from llmops.model import GPT
    from llmops.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(name)
    model = GPT.from_pretrained(name, dtype=dtype)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    long = ids.repeat(1, 512 // ids.shape[1])
    print(f"{name}, {str(dtype).removeprefix('torch.')}: {PROMPT}", end="", flush=True)
    text = tokenizer.stream()
    for token in model.generate_stream(ids, tokens, temperature=0.0):
        print(text.push(int(token)), end="", flush=True)
    print(text.flush())

    decode: dict[str, list[float]] = {"auto": [], "reference": []}
    prefill: dict[str, list[float]] = {"auto": [], "reference": []}
    for turn in range(4):
        for backend in decode if turn % 2 == 0 else reversed(decode):
            with llmops.use_backend(backend):
                moments = [time.perf_counter()]
                for _ in model.generate_stream(ids, tokens, temperature=0.0):
                    moments.append(time.perf_counter())
                decode[backend].append((len(moments) - 2) / (moments[-1] - moments[1]))
                start = time.perf_counter()
                with torch.inference_mode():
                    model(long)
                prefill[backend].append(long.shape[1] / (time.perf_counter() - start))
    for what, rates in (("decode", decode), (f"prefill {long.shape[1]}", prefill)):
        ours, plain = (statistics.median(rates[b][1:]) for b in ("auto", "reference"))
        print(
            f"  {what}: {ours:.1f} tokens/s, plain PyTorch {plain:.1f} tokens/s: "
            f"{ours / plain:.2f}x ({torch.get_num_threads()} threads)"
        )
