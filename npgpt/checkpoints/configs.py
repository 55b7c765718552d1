"""Read configurations in any program's spelling, merge them, and fill in what the tensor shapes determine.

The spellings are those of Hugging Face's config.json, LLMs-from-scratch, nanoGPT, minGPT and OpenAI's hparams.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from operator import attrgetter
from typing import Any

from .. import parameters
from ..config import PUBLISHED, REQUIRED, Config
from ..errors import NpgptError, about
from ..parameters import Shape
from .ends import special_ids
from .tensor import Stated

FIELDS = {field.name for field in fields(Config)}
CONTEXT = "max_position_embeddings"

# Aliases of Config's fields: Hugging Face's attribute map, OpenAI's hparams.json, LLMs-from-scratch, nanoGPT.
SPELLINGS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    CONTEXT: "n_positions",
    "n_ctx": "n_positions",
    "n_vocab": "vocab_size",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "context_length": "n_positions",
    "block_size": "n_positions",
}

# transformers' other names for the two GELU formulas; gelu_fast rounds √(2/π) to ten digits.
GELUS = {"gelu_fast": "gelu_new", "gelu_python_tanh": "gelu_new", "gelu_accurate": "gelu_new", "gelu_python": "gelu"}

# Known keys that do not affect the logits: training, text generation, classification heads, half precision.
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
    """Read Config's fields from a config.json, an LLMs-from-scratch dictionary or nanoGPT's model_args.

    Returns (fields, unknown): the fields found, which may be only some of Config's, and the keys that npgpt does not
    know. n_ctx is kept as a separate field if it differs from n_positions. source names the mapping in errors. Raises
    NpgptError for another architecture, and for a field given twice with different values.
    """
    model_type = mapping.get("model_type", "gpt2")
    # minGPT has a block_size, and its model_type is a model's name or None
    mingpt = "block_size" in mapping and str(model_type or "gpt-").startswith(("gpt2", "gpt-", "gopher-", "openai-gpt"))
    if model_type != "gpt2" and not mingpt:
        raise NpgptError(f"{source}: model_type is {model_type!r:.80}, but npgpt runs only 'gpt2'")
    for key in ("add_cross_attention", "is_encoder_decoder", "pruned_heads", "quantization_config"):
        if mapping.get(key):
            raise NpgptError(f"{source}: {key} is {mapping[key]!r}, but npgpt runs GPT-2 as published, without it")
    fields: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for key, value in mapping.items():
        name = SPELLINGS.get(key, key)
        value = _formula(value) if name == "activation_function" else value
        if key == "n_ctx" and any(mapping.get(other, value) != value for other in ("n_positions", CONTEXT)):
            fields[key] = value  # transformers ignores it
            continue
        if name in fields and fields[name] != value:
            raise NpgptError(f"{source} contradicts itself: {spelt[name]} is {fields[name]!r}, but {key} is {value!r}")
        if name in FIELDS:
            fields[name], spelt[name] = value, key
    if "block_size" in mapping:  # nanoGPT has the key bias and the erf GELU; minGPT and build-nanogpt the tanh GELU
        is_nanogpt = "bias" in mapping and "embd_pdrop" not in mapping
        fields.setdefault("activation_function", "gelu" if is_nanogpt else "gelu_new")
    if "emb_dim" in mapping:
        fields.setdefault("tie_word_embeddings", False)  # LLMs-from-scratch's out_head is a separate parameter
    return fields, [key for key in mapping if key not in FIELDS and key not in SPELLINGS and key not in UNUSED]


def _formula(activation: Any) -> Any:
    """Return Config's name for an activation; return any other value unchanged."""
    return GELUS.get(activation, activation) if isinstance(activation, str) else activation


def tells_gelu(mapping: Mapping[str, Any]) -> bool:
    """Return whether a configuration determines the GELU, by stating it or by the keys of nanoGPT or minGPT."""
    return "activation_function" in mapping or (
        "block_size" in mapping and bool({"bias", "embd_pdrop"} & mapping.keys())
    )


def guess(activation: str) -> str:
    """Return the note for a checkpoint with nanoGPT's names and no statement of its GELU."""
    form = "the erf form (nanoGPT's)" if activation == "gelu" else "the tanh form (build-nanogpt's, minGPT's)"
    return (
        f"the checkpoint does not state its GELU, and {form} is a guess: "
        "choose with --activation gelu (erf) or gelu_new (tanh), or load(…, activation=…)"
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Return the contents of a config.json from which Hugging Face's transformers builds the same model."""
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | asdict(config)


def agreed(
    statements: Sequence[Stated], n_head: int | None, path: str, activation: str | None = None
) -> tuple[str, dict[str, Any], list[str]]:
    """Merge statements: return the names of their sources, the merged fields, and the keys that npgpt does not know.

    A stated field overrides an implied one, such as the activation that nanoGPT's keys imply. A given n_head or
    activation overrides both. Raises NpgptError if two statements contradict each other.
    """
    given = {"n_head": n_head, "activation_function": activation}
    agreed: dict[str, Any] = {}
    implied: dict[str, Any] = {}
    origin: dict[str, str] = {}
    unknown: list[str] = []
    for source, stated in statements:
        fields, strange = read_fields(stated, source)
        unknown += strange
        if type(fields.get("n_embd")) is int and fields.get("n_inner") == 4 * fields["n_embd"]:
            fields["n_inner"] = None
        fields |= special_ids(stated, source)
        said = {SPELLINGS.get(key, key) for key in stated}
        for key, value in fields.items():
            if key not in said:
                implied[key] = value
            elif key in agreed and agreed[key] != value:
                raise NpgptError(
                    f"{key} is {agreed[key]!r:.80} in {origin[key]}, but {value!r:.80} in {source}: "
                    "correct or remove the wrong one"
                )
            elif given.get(key) is None:
                agreed[key], origin[key] = value, source
    return " and ".join(source for source, _ in statements) or path, implied | agreed, unknown


def complete(
    stated: Mapping[str, Any],
    shapes: Mapping[str, Shape | None],
    n_head: int | None,
    source: str,
    activation: str | None = None,
) -> Config:
    """Return a Config from the stated fields and the tensor shapes; a shape of None is ignored.

    No shape depends on n_head, so n_head comes from the argument, else from the stated fields, else from the published
    model with these shapes. A stated n_head that contradicts the published model with the same width and depth is an
    error, because such a model would load silently and generate nonsense. An n_head given as the argument may
    contradict it: such a model may exist. If n_ctx and n_positions differ, the one that matches wpe is used.

    Raises NpgptError if a field is missing or invalid.
    """
    sizes = _sizes(shapes)
    fields = sizes | {key: value for key, value in stated.items() if key in FIELDS}
    if "n_positions" in sizes and stated.get("n_ctx") == sizes["n_positions"]:
        fields["n_positions"] = sizes["n_positions"]
    if activation is not None:
        fields["activation_function"] = _formula(activation)
    missing = [key for key in REQUIRED if key not in fields and key != "n_head"]
    if missing:
        raise NpgptError(f"{source} lacks {', '.join(missing)}, and no weight's name or shape determines it")
    with about(source):
        found = Config(**fields | sizes | {"n_head": 1})
    exact, alike = found.published_name(), _published_of_width_and_depth(found)
    if n_head is not None:
        fields["n_head"] = n_head
    elif "n_head" not in fields:
        if exact is None:
            raise NpgptError(
                f"{source} does not state n_head, and no shape depends on it: give it (--n-head N, or "
                f"load(…, n_head=N)); it must divide n_embd = {fields['n_embd']}"
            )
        fields["n_head"] = PUBLISHED[exact].n_head
    with about(source if n_head is None else f"{source}, with the given n_head = {n_head}"):
        config = Config(**fields)
    theirs = PUBLISHED[alike] if alike else config
    if n_head is None and config.n_head != theirs.n_head:
        swapped = f" ({config.n_head} is its n_layer)" if config.n_head == theirs.n_layer else ""
        raise NpgptError(
            f"{source} says n_head = {config.n_head}, but the weights have the "
            f"{'shapes' if exact else 'width and depth'} of {alike}, whose n_head is "
            f"{theirs.n_head}{swapped}: {theirs.n_embd} = {theirs.n_head} × {theirs.head_width}; "
            f"correct it, or insist with --n-head {config.n_head} (load(…, n_head={config.n_head}))"
        )
    return config


def _published_of_width_and_depth(config: Config) -> str | None:
    """Return the published model with a config's width and depth; vocabulary and context may differ."""
    shape = attrgetter("n_layer", "n_embd", "inner_width")
    return next((name for name, size in PUBLISHED.items() if shape(size) == shape(config)), None)


def _sizes(shapes: Mapping[str, Shape | None]) -> dict[str, Any]:
    """Return the sizes that the shapes determine, except those from tensors that are missing or not matrices."""
    matrices = {name: shape for name, shape in shapes.items() if shape is not None and len(shape) == 2}
    vocab_size, n_embd = matrices.get("wte.weight", (0, 0))
    n_positions, _ = matrices.get("wpe.weight", (0, 0))
    width, n_inner = matrices.get("h.0.mlp.c_fc.weight", (0, 0))
    sizes = {
        "vocab_size": vocab_size,
        "n_embd": n_embd,
        "n_positions": n_positions,
        "n_inner": n_inner if n_inner != 4 * width else 0,
        "n_layer": parameters.count_blocks(shapes),
    }
    return {key: size for key, size in sizes.items() if size}
