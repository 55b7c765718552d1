"""Character vocabularies from nanoGPT's meta.pkl. The pickle is parsed, never executed."""

from __future__ import annotations

from typing import Any

from ..checkpoints import pickles
from ..errors import NpgptError
from .tokenizer import File, Tokenizer, check_text, contents

META = "meta.pkl"


def from_meta(path: File, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a meta.pkl, which holds the dicts stoi (character to id) and itos (its inverse).

    Raises NpgptError for other contents and for ids that the model does not have. The tokenizer raises NpgptError for a
    character that is not in the vocabulary.
    """
    whole: Any = pickles.read(
        contents(path), str(path), {}, {}, lambda _: _refuse(path, "a reference to something else")
    )
    if (
        not isinstance(whole, dict)
        or not isinstance(whole.get("stoi"), dict)
        or not isinstance(whole.get("itos"), dict)
    ):
        _refuse(path, "no dicts stoi and itos")
    ids: dict[str, int] = whole["stoi"]
    for character, number in ids.items():
        if type(character) is not str or len(character) != 1 or type(number) is not int or number < 0:
            _refuse(path, f"the entry {character!r:.40}: {number!r:.40}, which is not a character and its id")
        check_text(character, f"{path}: a character")
    characters = {number: character for character, number in ids.items()}
    if len(characters) != len(ids) or characters != whole["itos"]:
        _refuse(path, "dicts stoi and itos that are not inverse to each other")
    if not ids or max(characters) >= vocab_size:
        raise NpgptError(
            f"{path} has ids up to {max(characters, default=-1)}, but the model's vocab_size is {vocab_size}"
        )
    if type(whole.get("vocab_size", vocab_size)) is not int or whole.get("vocab_size", len(ids)) != len(ids):
        _refuse(path, f"vocab_size {whole['vocab_size']!r:.40} but {len(ids)} characters")

    def ids_of(text: str, special: bool) -> list[int]:
        for at, character in enumerate(text):
            if character not in ids:
                raise NpgptError(
                    f"{path} has no id for {character!r} (U+{ord(character):04X}, character {at} of the text): the "
                    f"model knows {len(ids)} characters, {''.join(sorted(ids))!r:.200}"
                )
        return [ids[character] for character in text]

    pieces = {number: character.encode() for number, character in characters.items()}
    return Tokenizer(ids_of, pieces, {}, (path,))


def _refuse(path: File, what: str) -> Any:
    raise NpgptError(f"{path} is not a meta.pkl of nanoGPT's with a character vocabulary: it has {what}")
