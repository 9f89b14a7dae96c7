"""Text to token ids and back, for the models that `GPT.from_pretrained` loads.

The byte-pair merging is the `tokenizers` library's; here its parts are put together from what a
GGUF file or a transformers folder says. A token may end inside a multi-byte character: `stream()`
gives text only up to the last whole one.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmops.gguf_file import GGUFFile
from llmops.pretrained import find, need

# Stands inside control tokens that a chat message spells out, so that they stay text.
_GUARD = "\ue000"


class Tokenizer:
    """Made by load_tokenizer.

    Attributes:
        eos_id: the token that ends a text or a chat answer; None where the model has none.
        vocab_size: number of tokens.
    """

    def __init__(self, core: Any, eos_id: int | None, template: str | None, names: dict[str, str]):
        core.encode_special_tokens = True  # control tokens in text are found here, or not at all
        self._core = core
        self._template, self._names = template, names
        added = core.get_added_tokens_decoder()
        self._control = {token.content: id for id, token in added.items() if token.special}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.eos_id = eos_id
        self.vocab_size: int = core.get_vocab_size()

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of the text; no beginning or end token is added. A control token spelled out in
        the text, such as <|im_end|>, becomes that token; with parse_special=False (text from
        strangers) it stays plain text."""
        pieces = self._split.split(text) if parse_special and self._control else [text]
        ids: list[int] = []
        for piece in pieces:
            if parse_special and piece in self._control:
                ids.append(self._control[piece])
            else:
                ids += self._core.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, control tokens spelled out. Bytes that are not UTF-8 become
        U+FFFD."""
        return self._core.decode([int(id) for id in ids], skip_special_tokens=False)

    def stream(self) -> "TextStream":
        return TextStream(self)

    def encode_chat(
        self, messages: str | Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation in the model's own chat format.

        Args:
            messages: [{"role": "user", "content": "..."}, ...]; a str is one user message. Control
                tokens spelled out in a message stay plain text.
            add_generation_prompt: end where the model's answer begins.
        Raises:
            ValueError: the model has no chat template.
        """
        if self._template is None:
            raise ValueError(
                "llmops: this model has no chat template, so it was not trained to chat; "
                "use encode(text)"
            )
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if self._control:
            messages = [{**m, "content": self._guard(m["content"])} for m in messages]
        text = _render(
            self._template,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            **self._names,
        )
        ids: list[int] = []
        for piece in self._split.split(text) if self._control else [text]:
            if piece in self._control:
                ids.append(self._control[piece])
            else:
                ids += self.encode(piece.replace(_GUARD, ""), parse_special=False)
        return ids

    def _guard(self, text: str) -> str:
        return self._split.sub(lambda found: found[0][0] + _GUARD + found[0][1:], text)


class TextStream:
    """Decodes tokens one by one: push(id) returns the text that is certain by now, flush() what is
    left at the end."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[
            int
        ] = []  # the last token given, for decoders that look back, and later ones
        self._given = 0  # characters of their text already given

    def push(self, id: int) -> str:
        self._ids.append(int(id))
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):  # perhaps a character whose last bytes are still to come
            return ""
        new = text[self._given :]
        self._ids = self._ids[-1:]
        self._given = len(self._tokenizer.decode(self._ids))
        return new

    def flush(self) -> str:
        new = self._tokenizer.decode(self._ids)[self._given :]
        self._ids, self._given = [], 0
        return new


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of what GPT.from_pretrained loads under the same name: "smollm2-135m", a .gguf
    file, or a folder with tokenizer.json (or GPT-2's vocab.json and merges.txt)."""
    need("tokenizers")
    path = find(name_or_path)
    return _from_gguf(path) if path.is_file() else _from_folder(path)


def _byte_level_bpe(vocab: dict[str, int], merges: list[list[str]], single_digits: bool) -> Any:
    """GPT-2's scheme: text is cut at word boundaries (and around each digit, where the model was
    trained so), then the bytes of each piece are merged. A byte the vocabulary lacks is left out,
    as these models' own tokenizers do: SmolLM2 has no token for six of the control characters."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers

    core = Core(models.BPE(vocab=vocab, merges=[(left, right) for left, right in merges]))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if single_digits else words
    core.decoder = decoders.ByteLevel()
    return core


def _add_control(core: Any, contents: list[str]) -> None:
    from tokenizers import AddedToken

    core.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in contents])


def _from_gguf(path: Path) -> Tokenizer:
    fields = GGUFFile(path).fields

    def field(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.{name}", default)

    kind, split = field("ggml.model"), field("ggml.pre", "default")
    if kind != "gpt2" or split not in ("gpt-2", "smollm"):
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {kind!r} with tokenizer.ggml.pre {split!r}, "
            "supported is 'gpt2' with 'gpt-2' or 'smollm'; load the tokenizer from a folder with "
            "the model's tokenizer.json"
        )
    tokens = field("ggml.tokens")
    merges = [merge.split(" ") for merge in field("ggml.merges")]
    core = _byte_level_bpe({t: i for i, t in enumerate(tokens)}, merges, split == "smollm")
    types = zip(tokens, field("ggml.token_type"), strict=True)
    _add_control(core, [token for token, type in types if type == 3])  # 3: control, 1: ordinary
    names = {
        f"{name}_token": tokens[field(f"ggml.{name}_token_id")]
        for name in ("bos", "eos")
        if field(f"ggml.{name}_token_id") is not None
    }
    return Tokenizer(core, field("ggml.eos_token_id"), field("chat_template"), names)


def _from_folder(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Core

    def read(name: str) -> Any:
        return json.loads((path / name).read_text("utf-8")) if (path / name).is_file() else {}

    settings = read("tokenizer_config.json")
    if (path / "tokenizer.json").is_file():
        core = Core.from_file(str(path / "tokenizer.json"))
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        lines = (path / "merges.txt").read_text("utf-8").splitlines()
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        vocab = read("vocab.json")
        core = _byte_level_bpe(vocab, merges, single_digits=False)
        _add_control(core, [t for t in ("<|endoftext|>",) if t in vocab])
    else:
        raise FileNotFoundError(
            f"{path}: there is no tokenizer.json, nor vocab.json with merges.txt; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes one"
        )
    names = {}
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)  # a str, or an AddedToken's fields
        if token is not None:
            names[name] = token["content"] if isinstance(token, dict) else token
    eos = read("config.json").get("eos_token_id") if "eos_token" not in names else None
    eos_id = core.token_to_id(names["eos_token"]) if "eos_token" in names else eos
    template = settings.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text("utf-8")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return Tokenizer(core, eos_id[0] if isinstance(eos_id, list) else eos_id, template, names)


def _render(template: str, **values: Any) -> str:
    """The template language and its helpers are those that transformers gives chat templates; a
    template comes with a model, so it runs in jinja2's sandbox."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
    return environment.from_string(template).render(**values)
