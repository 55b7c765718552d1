"""Tabulate every setting of a tokenizer folder: whether npgpt honours it, and whether ids equal transformers'.

    python -m tests.support.tokenizer_table

writes tests/parity/TOKENIZERS.md. A silent difference is a text for which npgpt gives other ids than transformers, with
special tokens either encoded or treated as plain text. A folder that npgpt refuses has none. If transformers cannot
read a folder and npgpt can, that counts as a silent difference too.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npgpt.errors import NpgptError
from npgpt.text.tokenizer import Tokenizer
from npgpt.text.vocabularies import open_tokenizer

from .tokenizer_folders import VOCAB_SIZE, Case, Files, cases

N_TEXTS = 338

FIXED = """
Hello, world|hello world| the  the\tthe|It's they'll we've I'm|2026 and 1,234.5|naïve café|cafe\u0301|Straße ÆØÅ
ﬁ ﬂ Ⅷ ½|日本語のテキスト|中文，标点。|한국어 텍스트|Русский текст|Ελληνικά|עברית|العربية|हिन्दी|ไทย|🙂🤯👩‍👩‍👧‍👦🇫🇷
a\u200db\u200cc\ufeffd|x\u3000y\xa0z\u2028w\u2029v|<|endoftext|>|a<|endoftext|>b|<|endoftext|><|endoftext|>
 <|endoftext|> |<|user|>hi<|assistant|>|<|user|> hi <|assistant|> ho|x <|user|>y|x<|user|> y|x  <|user|>  y
x\n<|user|>\ny|x\u3000<|user|>\xa0y|\x1c<|user|>\x1d|<|user|><|user|>|<|user|>|  <|user|>|user|users|a user b
auser|user's|_user_|user_|Ⓐuser|user\u0301|éuser|user user user|useruser|USER user|[PAD]|[PAD][PAD] [pad]
<s>|</s>|<s>a</s>|<pad>|<unk>|<mask>|<|im_start|>|<|im_end|>|<|endoftext|x|<|<|user|>|>|<||user||>|<|us|er|>
\u0130I\u0131i ſS|İstanbul|ΑΣ ας|\0\x01\x7f|\\|"'`
""".strip("\n").replace("\n", "|")


def texts(count: int = N_TEXTS) -> list[str]:
    """Return texts of many scripts, white space, added tokens in many surroundings, long runs; the first is empty."""
    split = FIXED.replace("<|", "\ue000").replace("|>", "\ue001").split("|")
    found = ["", *(text.replace("\ue000", "<|").replace("\ue001", "|>") for text in split)]
    found += [unit * 200 for unit in (" ", "\n", "a", "ab ", "é", "🙂", "<|user|>", "user ", "7", "!?")]
    found += [unicodedata.normalize(form, "Ångström naïve ﬁn 한국 ①") for form in ("NFC", "NFD", "NFKC", "NFKD")]
    generator = random.Random(5)
    units = [
        *"aeiou tnrs.,!?'-0159",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\u3000",
        "é",
        "e\u0301",
        "ß",
        "日",
        "я",
        "🙂",
        "\u200d",
    ]
    units += [
        "the",
        " the",
        "in",
        "user",
        "User",
        "<|user|>",
        " <|user|>",
        "<|user|> ",
        "<|endoftext|>",
        "[PAD]",
        "<s>",
    ]
    while len(found) < N_TEXTS:
        found.append("".join(generator.choices(units, k=generator.randrange(1, 24))))
    assert len(found) == N_TEXTS
    step = -(-N_TEXTS // count)
    return found[::step]


@dataclass(frozen=True)
class Outcome:
    """npgpt's result for a folder: the reason for refusing it, or the number of texts with different ids."""

    reason: str
    silent: int
    example: str = ""


def write(folder: Path, files: Files) -> None:
    """Write a folder's files."""
    for name, content in ({"config.json": {"model_type": "gpt2"}} | files).items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def differences(ours: Tokenizer, theirs: Any, some: Sequence[str]) -> list[str]:
    """Return what differs between npgpt's ids and transformers', with special tokens as such and as plain text."""
    found = []
    for text in some:
        for special in (True, False):
            mine, right = ours.encode(text, special=special), theirs(text, split_special_tokens=not special).input_ids
            if mine != right:
                found.append(f"{text!r:.60}, special={special}: {mine} and {right}")
    return found


def outcome(case: Case, some: Sequence[str]) -> Outcome:
    """Try a folder with npgpt and with transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), case.files)
        foreign = case.setting == "alone" and not case.honoured  # where GPT-2's would fit
        try:
            ours = open_tokenizer(Path(place, "model.safetensors"), 50257 if foreign else VOCAB_SIZE)
        except NpgptError as error:
            return Outcome(str(error).replace(place, "…"), 0)
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(place)
        except Exception as error:
            return Outcome("", len(some), f"transformers: {error}")
        differing = differences(ours, theirs, some)
        return Outcome("", len(differing), differing[0] if differing else "")


def main() -> int:
    """Write the table; return 1 if anything differs silently or is refused against expectation."""
    wrong, some = 0, texts()
    lines = [
        "# Every setting of a tokenizer's folder",
        "",
        f"Made by `python -m tests.support.tokenizer_table`: each against transformers on {len(some)} texts, with",
        "special tokens as such and as plain text. `as it stands`: tokenizer_config.json says PreTrainedTokenizerFast.",
        "",
        "| file | setting | npgpt | silent differences |",
        "|---|---|---|---|",
    ]
    for case in cases():
        found = outcome(case, some)
        if found.silent or case.honoured == bool(found.reason):
            wrong += 1
            print(f"{case.file}, {case.setting}: {found}", file=sys.stderr)
        setting = case.setting.replace("|", "\\|")
        lines.append(f"| {case.file} | {setting} | {'refused' if found.reason else 'honoured'} | {found.silent} |")
    Path(__file__).parents[1].joinpath("parity", "TOKENIZERS.md").write_text("\n".join(lines) + "\n", "utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
