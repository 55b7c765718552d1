"""How other programs spell a configuration: config.json, LLMs-from-scratch, nanoGPT, minGPT, OpenAI's hparams.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..config import REQUIRED, Config
from ..errors import NpgptError

# Other spellings of the same keys: Hugging Face's attribute map, OpenAI's hparams.json, LLMs-from-scratch, nanoGPT.
SPELLINGS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "n_ctx": "n_positions",
    "n_vocab": "vocab_size",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "context_length": "n_positions",
    "block_size": "n_positions",
}

# Keys that concern training, text generation, other heads' classes or half precision: right to have, of no effect here.
UNUSED = frozenset(
    """
    model_type architectures transformers_version torch_dtype dtype _name_or_path name_or_path use_cache bos_token_id
    eos_token_id pad_token_id sep_token_id decoder_start_token_id bias qkv_bias dropout drop_rate drop_rate_emb
    drop_rate_attn drop_rate_shortcut resid_pdrop embd_pdrop attn_pdrop initializer_range gradient_checkpointing
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    reorder_and_upcast_attn task_specific_params output_past output_attentions output_hidden_states return_dict
    torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder is_decoder is_encoder_decoder
    cross_attention_hidden_size add_cross_attention pruned_heads chunk_size_feed_forward finetuning_task id2label
    label2id num_labels problem_type prefix tokenizer_class do_sample early_stopping num_beams num_beam_groups
    diversity_penalty max_length min_length temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens attn_implementation _attn_implementation
    _attn_implementation_autoset _num_labels
    """.split()
)


def read_fields(mapping: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Config's fields out of a config.json, an LLMs-from-scratch dictionary or nanoGPT's model_args.

    Returns (fields, unknown): fields as found, perhaps not all of Config's; unknown are the keys that nobody knows.
    source names the mapping in errors. Raises NpgptError for another architecture and for one field given twice
    with different values.
    """
    _refuse_other_architectures(mapping, source)
    found: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    unknown: list[str] = []
    names = {field.name for field in fields(Config)}
    for key, value in mapping.items():
        name = SPELLINGS.get(key, key)
        if name not in names:
            if key not in UNUSED:
                unknown.append(key)
        elif name in found and found[name] != value:
            raise NpgptError(f"{source} contradicts itself: {spelt[name]} is {found[name]!r} and {key} is {value!r}")
        else:
            found[name], spelt[name] = value, key
    if "block_size" in mapping and "embd_pdrop" not in mapping:
        found.setdefault(
            "activation_function", "gelu"
        )  # nanoGPT's exact form; minGPT, with embd_pdrop, has the tanh form
    if "emb_dim" in mapping:
        found.setdefault("tie_word_embeddings", False)  # LLMs-from-scratch's out_head is a parameter of its own
    return found, unknown


def _refuse_other_architectures(mapping: Mapping[str, Any], source: str) -> None:
    model_type = mapping.get("model_type", "gpt2")
    # minGPT, which has a block_size, names one of its sizes there, or none
    mingpt = "block_size" in mapping and str(model_type or "gpt-").startswith(("gpt2", "gpt-", "gopher-", "openai-gpt"))
    if model_type != "gpt2" and not mingpt:
        raise NpgptError(f"{source}: model_type is {model_type!r:.80}, and npgpt runs 'gpt2' alone")
    for key in ("add_cross_attention", "is_encoder_decoder", "pruned_heads", "quantization_config"):
        if mapping.get(key):
            raise NpgptError(f"{source}: {key} is {mapping[key]!r}; npgpt runs GPT-2 as published, without it")


def from_dict(mapping: Mapping[str, Any], source: str = "the configuration") -> Config:
    """A Config from any of the key styles of read_fields.

    Raises NpgptError where a size is missing, wrong, or the architecture is another one.
    """
    found, _ = read_fields(mapping, source)
    missing = [key for key in REQUIRED if key not in found]
    if missing:
        raise NpgptError(f"{source} lacks {', '.join(missing)}")
    return Config(**found)


def to_dict(config: Config) -> dict[str, Any]:
    """The contents of a config.json that Hugging Face's transformers reads as the same model."""
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | {
        field.name: getattr(config, field.name) for field in fields(config)
    }
