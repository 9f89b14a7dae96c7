"""`llmops generate`: the text on standard output, the speed on standard error."""

import io
import re
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from model_kit import need, smollm2, smollm2_tokenizer

import llmops.model
from llmops.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def loaded(monkeypatch):
    """from_pretrained without reading the file anew; what it was asked for."""
    asked = {}
    models = {dtype: smollm2(dtype) for dtype in (torch.float32, torch.bfloat16)}
    tokenizer = smollm2_tokenizer()

    def from_pretrained(name, dtype, **others):
        asked.update(name=name, dtype=dtype, **others)
        return models[dtype]

    monkeypatch.setattr(llmops.model.GPT, "from_pretrained", from_pretrained)
    monkeypatch.setattr("llmops.tokenizer.load_tokenizer", lambda name: tokenizer)
    return asked


def test_generate_prints_text_and_speed(loaded, capsys):
    words = ["generate", "The capital of France is", "--max-new-tokens", "12"]
    assert main([*words, "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    ids = smollm2_tokenizer().encode("The capital of France is")
    expected = smollm2().generate([ids], max_new_tokens=12, temperature=0.0)[0]
    assert out == smollm2_tokenizer().decode(expected) + "\n"
    assert re.search(r"prefill: 5 tokens, [\d.]+ tokens/s; decode: 11 tokens, [\d.]+ tokens/s", err)
    assert "float32" in err


def test_generate_chat_prints_the_answer_only(loaded, capsys):
    assert main(["generate", "--chat", "What is the capital of France?", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


def test_generate_passes_its_options_on(loaded, capsys):
    words = ["generate", "Once", "--max-new-tokens", "8", "--top-k", "50", "--top-p", "0.95"]
    words += ["--min-p", "0.01", "--temperature", "1.5", "--model", "smollm2-135m"]
    words += ["--dtype", "bfloat16", "--backend", "reference"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*words, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert loaded["dtype"] == torch.bfloat16 and loaded["backend"] == "reference"


def test_generate_sets_threads(loaded, capsys):
    before = torch.get_num_threads()
    try:
        assert main(["generate", "Hi", "--max-new-tokens", "2", "--threads", "1"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert "1 threads" in capsys.readouterr().err


def test_generate_streams_whole_characters(loaded, monkeypatch):
    """Every write is valid text, and they come one by one."""

    class Out(io.StringIO):
        writes: ClassVar[list[str]] = []

        def write(self, text):
            self.writes.append(text)
            return len(text)

    ids = smollm2_tokenizer().encode("\U0001f469\u200d\U0001f467 \u65e5\u672c\u8a9e naive")
    stream = (torch.tensor([id]) for id in ids)
    monkeypatch.setattr(llmops.model.GPT, "generate_stream", lambda *args, **kwargs: stream)
    monkeypatch.setattr(sys, "stdout", Out())
    assert main(["generate", "Hi "]) == 0
    assert "".join(Out.writes) == "Hi \U0001f469\u200d\U0001f467 \u65e5\u672c\u8a9e naive\n"
    assert "\ufffd" not in "".join(Out.writes) and len([w for w in Out.writes if w]) > 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "Hi", "--temperature", "-1"], "temperature"),
        (["generate", "Hi", "--max-new-tokens", "9000"], "block_size 8192"),
    ],
)
def test_generate_reports_bad_input_in_one_line(words, message, loaded, capsys):
    assert main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("llmops: ") and message in err and err.count("\n") == 1


def test_generate_model_not_there(capsys):
    need("tokenizers")
    assert main(["generate", "Hi", "--model", "no-such-model"]) == 1
    assert 'there is no model "no-such-model"' in capsys.readouterr().err


def test_generate_rejects_bad_options(capsys):
    for words in (["--max-new-tokens", "0"], ["--threads", "0"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as stop:
            main(["generate", "Hi", *words])
        assert stop.value.code == 2


def test_generate_backend_not_there(loaded, capsys, monkeypatch):
    tiny = llmops.model.GPTConfig(
        vocab_size=49152, n_layer=1, n_head=1, d_model=8, block_size=300, backend="abacus"
    )
    monkeypatch.setattr(llmops.model.GPT, "from_pretrained", lambda *a, **k: llmops.model.GPT(tiny))
    assert main(["generate", "Hi", "--backend", "abacus"]) == 1
    assert "abacus" in capsys.readouterr().err


def test_module_runs_and_reads_standard_input():
    words = [sys.executable, "-m", "llmops", "generate", "-", "--max-new-tokens", "3"]
    done = subprocess.run(
        words, input="Two, four, six,", capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.startswith("Two, four, six,") and "tokens/s" in done.stderr
