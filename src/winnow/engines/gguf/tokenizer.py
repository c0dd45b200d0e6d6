"""The tokenizer of a GGUF file, from tokenizer.json. Two algorithms of llama.cpp make the same tokens as `tokenizers`: BPE on
bytes as in GPT-2, with one of several ways of cutting the text first, and BPE on characters as in SentencePiece. What neither
does is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType
from tokenizers import Tokenizer

from winnow.errors import InputError, first_line

SPACE = "▁"  # in the place of a space in SentencePiece's tokens
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
CUT = {"type": "Split", "behavior": "Isolated", "invert": False}
CUTS: dict[str, list[dict[str, Any]]] = {  # {name in llama.cpp: pre-tokenizers}
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "llama-bpe": [{**CUT, "pattern": {"Regex": LLAMA_3}}, {**BYTES, "use_regex": False}],
    "qwen2": [{**CUT, "pattern": {"Regex": QWEN_2}}, {**BYTES, "use_regex": False}],
}
REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
UNUSED_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
RARE = -1e6  # the score of a token that no merge makes


def entries(directory: Path, config: Any) -> dict[str, Any]:
    """{key of the file: value} of the tokenizer in a model directory, for a model with `config`.

    Raises InputError if there is none, if llama.cpp has no such algorithm, and if it has more tokens than the embedding."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{directory}: no tokenizer.json, which a GGUF file is made with; add it, or use --format dense")
    try:
        return _Tokens(path, json.loads(path.read_text(encoding="utf-8")), config).all()
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{path}: not a tokenizer: {what}") from error


class _Tokens:
    def __init__(self, path: Path, content: dict[str, Any], config: Any):
        self.path, self.content, self.model, self.config = path, content, content["model"], config

    def refuse(self, why: str) -> None:
        raise InputError(f"{self.path}: cannot be exported to gguf: {why}; use --format dense")

    def all(self) -> dict[str, Any]:
        if self.model.get("type") != "BPE":
            self.refuse(f"llama.cpp's tokenizers are compared with type BPE alone, this is {self.model.get('type')}")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(key):
                self.refuse(f"llama.cpp has no {key}")
        sentencepiece = bool(self.model.get("byte_fallback"))
        tokens, types = self._tokens(sentencepiece)
        found = self._sentencepiece(tokens) if sentencepiece else self._bytes()
        return {**found, Keys.Tokenizer.LIST: tokens, Keys.Tokenizer.TOKEN_TYPE: types, **self._special(), **self._template()}

    def _bytes(self) -> dict[str, Any]:
        given = self.content.get("pre_tokenizer") or {}
        parts = given["pretokenizers"] if given.get("type") == "Sequence" else [given]
        parts = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
        name = next((name for name, cuts in CUTS.items() if cuts == parts), None)
        if name is None:
            self.refuse(f"llama.cpp has no pre-tokenizer {json.dumps(given, ensure_ascii=False)} that is known to this version")
        if bool(self.model.get("ignore_merges")) != (name == "llama-bpe"):
            self.refuse(f"llama.cpp has no ignore_merges {self.model.get('ignore_merges')} with the pre-tokenizer {name}")
        normalizer = self.content.get("normalizer")
        if normalizer is not None and normalizer.get("type") != "NFC":  # text is in this form almost always
            self.refuse(f"llama.cpp has no normalizer {normalizer.get('type')} for this tokenizer")
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in self.model["merges"]]
        return {Keys.Tokenizer.MODEL: "gpt2", Keys.Tokenizer.PRE: name, Keys.Tokenizer.MERGES: merges}

    def _sentencepiece(self, tokens: list[str]) -> dict[str, Any]:
        given = self.content.get("normalizer") or {}
        parts = given.get("normalizers", [given] if given else [])
        before = self.content.get("pre_tokenizer") or {}
        scheme = "always" if parts[:1] == [{"type": "Prepend", "prepend": SPACE}] else "never"
        if scheme == "always":
            parts = parts[1:]
        if before.get("type") == "Metaspace" and not parts and scheme == "never":
            scheme = before.get("prepend_scheme", "always")
            if before.get("replacement") != SPACE or before.get("split", True) or scheme not in ("always", "first", "never"):
                self.refuse("llama.cpp has no pre-tokenizer Metaspace of this kind")
        elif parts != [REPLACED] or before not in ({}, UNUSED_SPLIT):
            self.refuse("llama.cpp only replaces spaces before BPE on characters; its normalizer or pre-tokenizer does more")
        scores = self._scores()
        return {
            Keys.Tokenizer.MODEL: "llama",
            Keys.Tokenizer.PRE: "default",
            Keys.Tokenizer.SCORES: [scores.get(token, RARE) for token in tokens],
            Keys.Tokenizer.ADD_PREFIX: scheme != "never",
        }

    def _scores(self) -> dict[str, float]:
        """{token: score}, the higher the earlier it is merged. SentencePiece merges any two pieces that are a token together:
        that is the same only if all such pairs are merges, and those of a token follow each other."""
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in self.model["merges"]]
        vocabulary = self.model["vocab"]
        ranks: dict[str, dict[tuple[str, ...], int]] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, {})[left, right] = rank
        added = {token["content"] for token in self.content.get("added_tokens", [])}
        for token in vocabulary:
            cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
            pairs = [pair for pair in cuts if all(part in vocabulary for part in pair)]
            known = ranks.get(token, {})
            if token not in added and any(pair not in known for pair in pairs):
                self.refuse(f"its merges are not those of SentencePiece: not all pairs that make the token {token!r} are merged")
            if known and max(known.values()) - min(known.values()) >= len(known):
                self.refuse(f"its merges are not those of SentencePiece: others are between those of {token!r}")
        return {token: -float(min(known.values())) for token, known in ranks.items()}

    def _tokens(self, sentencepiece: bool) -> tuple[list[str], list[int]]:
        """(every token, its type), by id; ids of the embedding without a token are unused ones."""
        rows = self.config.vocab_size
        tokens, types = [f"[PAD{i}]" for i in range(rows)], [int(TokenType.UNUSED)] * rows
        kinds = {token: TokenType.NORMAL for token in self.model["vocab"]}
        if sentencepiece:
            kinds |= {token: TokenType.BYTE for token in kinds if len(token) == 6 and token.startswith("<0x")}
        ids = dict(self.model["vocab"])
        for token in self.content.get("added_tokens", []):
            ids[token["content"]] = token["id"]
            kinds[token["content"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if sentencepiece and self.model.get("unk_token"):
            kinds[self.model["unk_token"]] = TokenType.UNKNOWN
        for token, index in ids.items():
            if index >= rows:
                self.refuse(f"the token {token!r} has the id {index}, but the embedding has {rows} rows")
            tokens[index], types[index] = token, int(kinds[token])
        return tokens, types

    def _special(self) -> dict[str, Any]:
        """Ids of special tokens, and which are added to a text."""
        try:
            tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises no other class
            raise InputError(f"{self.path}: not a tokenizer: {first_line(error)}") from error
        text, inner = (tokenizer.encode("a", add_special_tokens=added).ids for added in (True, False))
        at = next((i for i in range(len(text) - len(inner) + 1) if text[i : i + len(inner)] == inner), 0)
        before, after = text[:at], text[at + len(inner) :]
        if len(before) > 1 or len(after) > 1:
            self.refuse(f"llama.cpp adds at most one token before and one after a text, it adds {before} and {after}")
        found: dict[str, Any] = {Keys.Tokenizer.ADD_BOS: bool(before), Keys.Tokenizer.ADD_EOS: bool(after)}
        given = {name: getattr(self.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        given |= {"bos": before[0]} if before else {}
        given |= {"eos": after[0]} if after else {}
        keys = {"bos": Keys.Tokenizer.BOS_ID, "eos": Keys.Tokenizer.EOS_ID, "pad": Keys.Tokenizer.PAD_ID}
        for name, value in given.items():
            first = value[0] if isinstance(value, list) else value  # llama.cpp finds the other ends by their names
            if first is not None and first >= 0:
                found[keys[name]] = first
        unknown = self.model.get("unk_token")
        return found | ({Keys.Tokenizer.UNK_ID: self.model["vocab"][unknown]} if unknown in self.model["vocab"] else {})

    def _template(self) -> dict[str, Any]:
        """The chat template, if there is one."""
        beside, settings = self.path.with_name("chat_template.jinja"), self.path.with_name("tokenizer_config.json")
        if beside.is_file():
            return {Keys.Tokenizer.CHAT_TEMPLATE: beside.read_text(encoding="utf-8")}
        given = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
        return {Keys.Tokenizer.CHAT_TEMPLATE: given} if isinstance(given, str) else {}
