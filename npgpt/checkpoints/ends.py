"""Determine the ids at which a model's texts begin and end, and report generation settings that npgpt ignores.

Like transformers' generate, npgpt takes the end-of-text ids from generation_config.json if there is one, else from
config.json.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import NpgptError, check_kinds, whole_number
from .tensor import Stated

GENERATION_FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Settings that transformers' generate obeys, each with its neutral value (None is always neutral).
SETTINGS: dict[str, object] = {
    **dict.fromkeys(("do_sample", "early_stopping", "remove_invalid_values", "renormalize_logits"), False),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty"), 1.0),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), 1.0),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), 0.0),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    "top_k": 50,
    "max_length": 20,
    **dict.fromkeys(("max_new_tokens", "max_time", "stop_strings", "bad_words_ids", "force_words_ids"), None),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "constraints"), None),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), None),
}
# Keys of generation_config.json that do not change the generated ids.
WITHOUT_EFFECT = frozenset(
    """
    bos_token_id eos_token_id pad_token_id decoder_start_token_id transformers_version _from_model_config use_cache
    cache_implementation cache_config max_cache_len return_legacy_cache output_attentions output_hidden_states
    output_scores output_logits return_dict_in_generate do_sample is_assistant compile_config disable_compile
    low_memory prefill_chunk_size num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    """.split()
)


@dataclass(frozen=True)
class Ends:
    """The special ids that a model's files state, without those outside its vocabulary.

    A text ends at any id in eos and begins after bos. pad is kept for transformers. notes list what the files state
    but npgpt does not use.
    """

    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)  # {key: file that states it}
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_kinds({"eos": "Iterable[int]"}, [("eos", self.eos)])
        object.__setattr__(self, "eos", tuple(whole_number("an id of eos", token_id, low=0) for token_id in self.eos))
        if self.bos is not None:
            object.__setattr__(self, "bos", whole_number("bos", self.bos, low=0))

    def completed(self, end_of_text: int | None) -> Ends:
        """Return a copy in which end_of_text, the vocabulary's <|endoftext|>, fills in an unstated eos and bos."""
        eos = self.eos or (() if end_of_text is None else (end_of_text,))
        return replace(self, eos=eos, bos=end_of_text if self.bos is None else self.bos)

    def stated(self) -> dict[str, int | list[int]]:
        """Return the ids under config.json's keys, without those that are not stated."""
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos)
        found = zip(IDS, (self.bos, eos, self.pad), strict=True)
        return {key: value for key, value in found if value is not None and value != []}


def special_ids(mapping: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the ids in a mapping: whole numbers, or, for eos_token_id, a list of several.

    Keys with null or an empty list are left out. Raises NpgptError for any other value.
    """
    found = {key: mapping[key] for key in IDS if mapping.get(key) is not None and mapping[key] != []}
    for key, value in found.items():
        several = key == "eos_token_id"
        if any(type(token_id) is not int for token_id in (value if several and isinstance(value, list) else [value])):
            kind = "a whole number or a list of them" if several else "a whole number"
            raise NpgptError(f"{source}: {key} must be {kind}, or null, not {value!r:.80}")
    return {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in found.items()}


def ends_of(
    statements: Sequence[Stated], agreed: Mapping[str, Any], generation: Stated | None, vocab_size: int
) -> Ends:
    """Return the special ids in use, with notes on what is ignored.

    statements are the configuration's, and agreed is their merged fields. generation is generation_config.json's
    statement: if it exists, it alone decides which ids end a text, while ids that it leaves out come from the
    configuration. Raises NpgptError for an invalid id.
    """
    configuration = " and ".join(stated.source for stated in statements)
    deciding = statements if generation is None else [generation]
    ids = special_ids(agreed, configuration)
    sources = dict.fromkeys(ids, configuration)
    notes = []
    if generation is not None:
        stated = special_ids(generation.fields, generation.source)
        if "eos_token_id" in ids and "eos_token_id" not in stated:
            other = ids.pop("eos_token_id")
            notes.append(f"{generation.source} states no eos_token_id: {other} from the configuration is ignored")
        ids, sources = ids | stated, sources | dict.fromkeys(stated, generation.source)
    bos, eos = ids.get("bos_token_id"), ids.get("eos_token_id", [])
    eos = list(dict.fromkeys(eos if isinstance(eos, list) else [eos]))
    known = range(vocab_size)
    for key, stated_ids in (("bos_token_id", [] if bos is None else [bos]), ("eos_token_id", eos)):
        if beyond := ", ".join(str(token_id) for token_id in stated_ids if token_id not in known):
            notes.append(f"{sources[key]} states {key} {beyond}, but the model has only {vocab_size} ids")
    notes += [note for one in deciding for note in _not_applied(one, SETTINGS if generation is None else one.fields)]
    return Ends(
        eos=tuple(token_id for token_id in eos if token_id in known),
        bos=bos if bos in known else None,
        pad=ids.get("pad_token_id"),
        sources=sources,
        notes=tuple(notes),
    )


def _not_applied(stated: Stated, keys: Container[str]) -> list[str]:
    """Return a note on the settings for transformers' generate under these keys; npgpt takes them as arguments."""
    found = {
        key: repr(value)
        for key, value in stated.fields.items()
        if key in keys and key not in WITHOUT_EFFECT and value is not None and value != SETTINGS.get(key)
    }
    told = ", ".join(f"{key} {value if len(value) <= 80 else value[:77] + ' …'}" for key, value in found.items())
    return [f"{stated.source} sets {told}: ignored in favour of npgpt's arguments"] if found else []
