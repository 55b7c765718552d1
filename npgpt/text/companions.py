"""The files beside a vocabulary: tokenizer_config.json, special_tokens_map.json and added_tokens.json.

They are interpreted as in transformers 5.23: which file wins, in which order tokens are added, and what each key does.
A key that npgpt does not support is either in UNUSED, because it changes no ids, or raises NpgptError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoints import strict_json
from ..errors import NpgptError
from .added_tokens import AddedToken, token
from .tokenizer import END_OF_TEXT, File, contents

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
COMPANIONS = (CONFIG, MAP, ADDED)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SEVERAL = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
ADDS = ("add_bos_token", "add_eos_token", "add_prefix_space")
HONOURED = {"tokenizer_class", "added_tokens_decoder", *SEVERAL}

# Keys of tokenizer_config.json that change no ids: later processing of ids or text, chat templates, names, lengths
# (transformers only warns of them), and paths, which the files in the folder override.
UNUSED = frozenset(
    """
    model_max_length max_len max_length name_or_path processor_class model_input_names padding_side truncation_side
    stride truncation_strategy pad_to_multiple_of pad_token_type_id clean_up_tokenization_spaces errors trim_offsets
    clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output chat_template chat_control_tokens
    response_template response_schema special_tokens_map_file tokenizer_file vocab_file merges_file added_tokens_file
    is_local local_files_only use_fast trust_remote_code verbose transformers_version backend files_loaded
    return_token_type_ids return_attention_mask return_tensors _commit_hash
    """.split()
)
# Keys that change nothing with these values, but would with others.
HARMLESS: Mapping[str, tuple[object, ...]] = {
    "split_special_tokens": (False,),
    "do_lower_case": (False,),
    "auto_map": ({},),
    "init_inputs": ([], ()),
    "from_slow": (False,),
    "legacy": (False, True),
    "fast_tokenizer_files": (["tokenizer.json"],),
}
END = AddedToken(END_OF_TEXT, special=True, normalized=False)
GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "PythonBackend")


@dataclass(frozen=True)
class Companions:
    """The settings in the files beside a vocabulary."""

    uses_all: bool  # use all of tokenizer.json; otherwise GPT-2's pre-tokenizer and no normalizer
    reason: str  # the file and key that decide this, as a clause for messages
    added: tuple[AddedToken, ...]  # in the order of their new ids
    winner: str  # the file whose tokens count
    stated: tuple[tuple[str, AddedToken | str, int | None], ...]  # file, token or its content, id: to be compared
    around: tuple[str | None, str | None]  # tokens before and after a text, unless tokenizer.json decides
    adds: Mapping[str, bool]  # add_bos_token, add_eos_token, add_prefix_space, if stated


def read(
    here: Mapping[str, File],
    model_class: object = None,
    whole: Mapping[str, Any] | None = None,
    whole_source: str = "",
    *,
    defaults: bool = True,
) -> Companions:
    """Read the files beside a vocabulary, if they exist.

    model_class: the tokenizer_class in config.json. whole: the contents of tokenizer.json. defaults: make <|endoftext|>
    a special token even if no file says so, as transformers' GPT2Tokenizer does. Raises NpgptError for an unsupported
    setting or class and for files that contradict each other.
    """
    config, special_map, legacy = (
        strict_json.read_object(contents(here[name]), str(here[name])) if name in here else {} for name in COMPANIONS
    )
    source, map_source, legacy_source = (str(here.get(name, name)) for name in COMPANIONS)
    _check_keys(config, source)
    uses_all, reason = _class(config.get("tokenizer_class"), model_class, source)
    if uses_all and whole is None:
        raise NpgptError(f"{reason}, which needs tokenizer.json, but that is missing")

    of_whole = [_with_id(entry, whole_source) for entry in _list((whole or {}).get("added_tokens"), whole_source)]
    by_id, listed = dict(of_whole), "added_tokens_decoder" in config
    if listed:  # then the tokens of other files are only compared
        by_id = _decoder(config["added_tokens_decoder"], source)
    special, extra = _special(config, source)
    of_map, extra_of_map = _special(special_map, map_source, special=True)
    if not listed:
        special, extra = special | of_map, [*extra, *extra_of_map]
        known = {new.content for key, new in special.items() if key in NAMED}
        known |= {new.content for new in extra if "additional_special_tokens" not in special_map}
        for content, number in legacy.items():
            if type(number) is not int:
                raise NpgptError(
                    f"{legacy_source}: the id of {content!r:.60} must be a whole number, not {number!r:.60}"
                )
            by_id.setdefault(number, AddedToken(content, special=content in known, normalized=content not in known))
    if defaults and not uses_all:
        unnamed = [key for key in NAMED[:3] if key not in config and (listed or key not in special_map)]
        special |= dict.fromkeys(unnamed, END)
    padding = (whole or {}).get("padding")
    if uses_all and "pad_token" not in {**config, **special_map} and isinstance(padding, Mapping):
        special["pad_token"] = token(padding.get("pad_token"), whole_source)
    for key, new in of_map.items():
        if key in NAMED and (key not in special or special[key].content != new.content):
            other = repr(special[key].content) if key in special else "none"
            raise NpgptError(f"{map_source} says that {key} is {new.content!r:.60}, but {source} says {other:.60}")
    if not defaults:  # in formats unknown to transformers, <|endoftext|> is special if it exists
        special |= {key: END for key in NAMED[:2] if config.get(f"add_{key}") and key not in config}
    ends = [special[key].content if config.get(f"add_{key}") and key in special else None for key in NAMED[:2]]
    return Companions(
        uses_all,
        reason,
        tuple(_added([new for _, new in of_whole] if uses_all else [], by_id, special, extra)),
        source if listed else whole_source if whole else "the vocabulary",
        (
            *((whole_source, new, number) for number, new in of_whole),
            *((source, new, number) for number, new in by_id.items() if listed),
            *((map_source, new, None) for new in (*of_map.values(), *extra_of_map)),
            *((legacy_source, content, number) for content, number in legacy.items()),
        ),
        (ends[0], ends[1]),
        {key: config[key] for key in ADDS if key in config},
    )


def _special(mapping: Mapping[str, Any], source: str, **flags: bool) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Return the named and the other special tokens of tokenizer_config.json or special_tokens_map.json."""
    named = {key: value for key, value in mapping.items() if key.endswith("_token") and key not in ADDS}
    for key in SEVERAL:
        if isinstance(mapping.get(key), Mapping):
            named |= mapping[key]
    if wrong := [key for key in SEVERAL if not isinstance(mapping.get(key), list | Mapping | None)]:
        raise NpgptError(f"{source}: {wrong[0]} must be a list or an object of tokens, not {mapping[wrong[0]]!r:.60}")
    lists = [[token(v, source, **flags) for v in mapping[key]] for key in SEVERAL if isinstance(mapping.get(key), list)]
    if len(filled := [each for each in lists if each]) > 1 and filled[0] != filled[1]:
        raise NpgptError(f"{source} contradicts itself: {SEVERAL[0]} and {SEVERAL[1]} differ")
    if unknown := sorted(mapping.keys() - named.keys() - {*SEVERAL}) if flags else []:
        raise NpgptError(f"{source} has the key {unknown[0]!r:.60}, which is not a special token")
    return (
        {key: token(value, source, **flags) for key, value in named.items() if value is not None},
        filled[0] if filled else [],
    )


def _added(
    tokens: list[AddedToken],
    by_id: Mapping[int, AddedToken],
    special: Mapping[str, AddedToken],
    extra: list[AddedToken],
) -> list[AddedToken]:
    """Return all added tokens in transformers' order: tokenizer.json's, those with ids, the named ones, the others."""
    later = [new for _, new in sorted(by_id.items())]
    known = {new.content for new in (*tokens, *later)}
    own = [key for key in special if key not in NAMED]
    for new in (*(special[key] for key in (*NAMED, *own) if key in special), *extra):
        if new.content not in known:
            known.add(new.content)
            later.append(new)
    named = {new.content for new in special.values()}
    return [*tokens, *(replace(new, special=new.special or new.content in named) for new in later)]


def _list(value: object, source: str) -> list[Any]:
    if not isinstance(value, list | None):
        raise NpgptError(f"{source}: added_tokens must be a list, not {type(value).__name__}")
    return value or []


def _with_id(entry: object, source: str) -> tuple[int, AddedToken]:
    """Return an added token of tokenizer.json, with its id."""
    new = token(entry, source)
    number = entry.get("id") if isinstance(entry, Mapping) else None
    if type(number) is not int:
        raise NpgptError(f"{source}: the id of the added token {new.content!r:.60} must be a whole number")
    return number, new


def _class(stated: object, model_class: object, source: str) -> tuple[bool, str]:
    """Return whether to use all of tokenizer.json, and why. Raises NpgptError for an unsupported class."""
    found, where = (stated, source) if stated is not None else (model_class, "config.json")
    if found is None:
        return False, "no tokenizer_config.json states a tokenizer_class, so the class is GPT2Tokenizer"
    says = f"{where} says that tokenizer_class is {found!r:.60}"
    if found not in (*GPT2, *GENERIC):
        raise NpgptError(f"{says}, which is not GPT-2's kind of vocabulary")
    return found in GENERIC, says


def _check_keys(config: Mapping[str, Any], source: str) -> None:
    for key, value in config.items():
        if key in ADDS:
            if type(value) is not bool:
                raise NpgptError(f"{source}: {key} must be true or false, not {value!r:.60}")
        elif key in HARMLESS:
            if value is not None and value not in HARMLESS[key]:
                raise NpgptError(f"{source}: {key} is {value!r:.60}, which npgpt does not support")
        elif key not in HONOURED and key not in UNUSED and not key.endswith("_token"):
            raise NpgptError(
                f"{source} has the setting {key!r:.60}, which npgpt does not know and which may change ids: "
                "delete it if it does not"
            )


def _decoder(decoder: object, source: str) -> dict[int, AddedToken]:
    """Return the tokens of added_tokens_decoder by id."""
    if not isinstance(decoder, Mapping) or not all(re.fullmatch("[0-9]{1,18}", k) for k in decoder):
        raise NpgptError(f"{source}: added_tokens_decoder must be an object {{id: token}}")
    return {int(key): token(value, source) for key, value in decoder.items()}
