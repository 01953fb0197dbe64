#!/usr/bin/env python3
"""Trains a small unigram model with sentencepiece (0.2.3), laid out as T5's, and writes what it makes of some texts.

    pip install sentencepiece && python make.py

Its rules of normalisation are a handful of those that T5 has, so that the file stays small.
"""
import json
import tempfile
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
RULES = {
    "\t": " ",
    "\n": " ",
    "\r": " ",
    "\u00a0": " ",
    "\u3000": " ",
    "\u200b": "",
    "\ufb01": "fi",
    "\u00bd": "1\u20442",
    "e\u0301": "\u00e9",
    "\uff21": "A",
    "\uff11": "1",
    "\u2026": "...",
}
TEXTS = [
    "",
    " ",
    "red heart",
    "  Red\t\tHEART \n ",
    "a photo of a cat, isn't it? we'll see",
    "A  wide   shot of a  panda \u2026 playing guitar",
    "\ufb01re and \ufb01sh at \u00bd price",
    "cafe\u0301 caf\u00e9 \uff21\uff11 x\u200by",
    "\u00fcn\u00efc\u00f6d\u00e9 \u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "emoji \U0001f3a8 and more \U0001f680\U0001f680",
    "1234 3.14 2nd (((weights:1.2))) [a|b] --v 5 #tag @you",
    "\u2581already \u2581 marked",
    "line one\nline two\r\nline three",
    "supercalifragilisticexpialidocious",
    "the quick brown fox jumps over the lazy dog " * 3,
]


def corpus():
    words = Path(HERE / "../../../../README.md").read_text() + Path(HERE / "../../../../ARCHITECTURE.md").read_text()
    return words.splitlines() + [text for text in TEXTS if text.strip()] * 4


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "corpus.txt").write_text("\n".join(corpus()))
        code = lambda text: " ".join(f"{ord(c):X}" for c in text)
        rules = "".join(f"{code(a)}\t{code(b)}\n" for a, b in RULES.items())
        (folder / "rules.tsv").write_text(rules)
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"),
            model_prefix=str(folder / "spiece"),
            vocab_size=600,
            model_type="unigram",
            normalization_rule_tsv=str(folder / "rules.tsv"),
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        (HERE / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "spiece.model"))
    cases = [{"text": text, "ids": model.encode(text)} for text in TEXTS]
    (HERE / "cases.json").write_text(json.dumps({"vocab_size": model.vocab_size(), "cases": cases}) + "\n")


main()
