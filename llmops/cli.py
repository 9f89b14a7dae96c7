"""The llmops command. A subcommand is one `_add_<name>` (its options) and one `_cmd_<name>` (what
it does) here, or a line in _ELSEWHERE and a module with `add_arguments(parser)` and
`run(arguments)`. Everything heavy is imported where it is used, so that --help is immediate.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Subcommand -> (its module, what it does).
_ELSEWHERE = {
    "bench": ("llmops.bench.command", "measure the operators beside torch"),
    "conform": (
        "llmops.testing._command",
        "hold an operator, of llmops or your own, to the conformance kit",
    ),
    "tune": ("llmops.bench.tune", "find this GPU's fastest configurations of the Triton kernels"),
    "demo": ("llmops.demo", "text from a real model, its speed and each op's beside plain PyTorch"),
}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _add_generate(commands: Any) -> None:
    p = _command(
        commands, "generate", _cmd_generate, "continue a text, or answer it with --chat, as it goes"
    )
    p.add_argument("prompt", help='the text to continue; "-" reads it from standard input')
    p.add_argument(
        "--model",
        default="smollm2-135m",
        help="smollm2-135m, a .gguf file, or a folder with config.json and safetensors "
        "(default: %(default)s)",
    )
    p.add_argument("--max-new-tokens", type=_positive, default=200, metavar="N")
    p.add_argument(
        "--temperature", type=float, default=1.0, help="0: always the likeliest token (default: 1)"
    )
    p.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    p.add_argument(
        "--top-p", type=float, default=1.0, help="only the likeliest tokens that make up p"
    )
    p.add_argument(
        "--min-p", type=float, default=0.0, help="only tokens at least p times the likeliest one"
    )
    p.add_argument("--seed", type=int, help="the same seed gives the same text")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    p.add_argument(
        "--backend", help="cpu, triton, cuda, or reference: plain PyTorch (default: automatic)"
    )
    p.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    p.add_argument("--chat", action="store_true", help="the prompt is a message to a chat model")
    p.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")


def _cmd_generate(args: argparse.Namespace) -> int:
    """The text goes to standard output, the speed to standard error."""
    import torch

    from llmops.model import GPT
    from llmops.tokenizer import load_tokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    ids = tokenizer.encode_chat(prompt) if args.chat else tokenizer.encode(prompt)
    if not ids:
        raise ValueError("llmops generate: the prompt is empty; give at least one character")
    model = GPT.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), device=args.device, backend=args.backend
    )
    generator = None
    if args.seed is not None:
        generator = torch.Generator(args.device).manual_seed(args.seed)

    start = time.perf_counter()
    stream = model.generate_stream(
        torch.tensor([ids], device=args.device),
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        generator=generator,
        eos_id=tokenizer.eos_id,
    )
    text = tokenizer.stream()
    moments: list[float] = []  # when each token was known
    for tokens in stream:
        if not moments and not args.chat:  # not before what is wrong with the options is known
            _write(prompt)
        id = int(tokens)
        moments.append(time.perf_counter())
        if id != tokenizer.eos_id:
            _write(text.push(id))
    _write(text.flush() + "\n")
    report = f"prefill: {len(ids)} tokens, {len(ids) / (moments[0] - start):.1f} tokens/s"
    if len(moments) > 1:
        rate = (len(moments) - 1) / (moments[-1] - moments[0])
        report += f"; decode: {len(moments) - 1} tokens, {rate:.1f} tokens/s"
    threads = torch.get_num_threads()
    print(f"[{report}; {args.dtype}, {threads} threads]", file=sys.stderr)
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _add_info(commands: Any) -> None:
    _command(commands, "info", _cmd_info, "what is usable here, and where not, why")


def _cmd_info(args: argparse.Namespace) -> int:
    from llmops import report

    print(report.text())
    return 0


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int] | None, help: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="llmops", description="Kernels for language models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_info(commands)
    for name, (module_name, help) in _ELSEWHERE.items():
        command = _command(commands, name, None, help)
        if words[:1] == [name]:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(words)
    # text of any model must print: a terminal without UTF-8 shows what it cannot as "?"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        return args.run(args)
    except (ValueError, TypeError, ImportError, FileNotFoundError, NotImplementedError) as error:
        print(f"llmops: {str(error).removeprefix('llmops: ')}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader had enough, as with `| head`; nor is there more to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
