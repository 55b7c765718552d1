"""PyTorch modules as users pass them: untrained, with dropout, wrapped, or with parts called too often or never."""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import parameters
from npgpt.config import Config
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.oracle import conditions
from npgpt.oracle.report import Report
from npgpt.parameters import Array
from tests.support.models import no_text, random_arrays, random_ids, small

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")
foreign = pytest.importorskip("tests.support.foreign", reason="extra parity is not installed")
functional = torch.nn.functional
BASE: Any = torch.nn.Module

CONFIG = small(n_embd=24, n_head=4, n_layer=3)
ARRAYS = random_arrays(CONFIG)
IDS = random_ids(CONFIG, (2, 9))


def model(config: Config = CONFIG, arrays: dict[str, Array] = ARRAYS) -> LanguageModel:
    return LanguageModel("reference", config, parameters.from_arrays(config, arrays), no_text("none"))


def book() -> Any:
    return foreign.build("llms-from-scratch", CONFIG, ARRAYS)


def replaced(part: Any, forward: Any) -> None:
    """Replace a part's forward by a function that takes the part as its first argument."""
    part.forward = types.MethodType(forward, part)


def fresh(**fields: Any) -> Any:
    """Return transformers' newly initialised model: in training mode, all biases 0 and all gains 1."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 24, "n_embd": 24, "n_layer": 3, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | fields, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize("style", foreign.STYLES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_right_module_matches_its_reference(style: str, dtype: str) -> None:
    """In half precision, the reference uses the module's rounded weights."""
    module = foreign.build(style, CONFIG, ARRAYS).to(getattr(torch, dtype))
    report = npgpt.check(module, IDS, model())
    assert report.matches, str(report)
    rounded = any(f"the reference's, rounded to the stored dtype, {dtype}." in note for note in report.notes)
    assert rounded == (dtype in ("float16", "bfloat16"))


def test_a_padded_vocabulary_and_a_short_context_match() -> None:
    config = small(n_embd=24, n_head=4, n_layer=3, vocab_size=48, n_positions=16)
    arrays = ARRAYS | {
        "wte.weight": np.r_[ARRAYS["wte.weight"], np.zeros((8, 24))],
        "wpe.weight": ARRAYS["wpe.weight"][:16],
    }
    report = npgpt.check(foreign.build("nanogpt", config, arrays), IDS, model())
    assert report.matches, str(report)
    assert "wte.weight is of shape [48, 24], not [40, 24]: the first 40 rows are equal." in report.notes


def test_a_head_that_was_not_loaded_is_told() -> None:
    """A forgotten out_head is reported, although all stages agree because the module's own head is used."""
    module = book()
    module.out_head.reset_parameters()
    report = npgpt.check(module, IDS, model())
    assert report.problems == [
        "lm_head.weight is never loaded: still the initial values (uniform within 1/sqrt(24)); the reference's output "
        "head is its wte.weight (tied)"
    ]
    assert not report.matches
    assert report.first is None
    with torch.no_grad():
        module.out_head.weight.copy_(torch.tensor(ARRAYS["wte.weight"].reshape(24, 40).T))
    (problem,) = npgpt.check(module, IDS, model()).problems
    assert problem.startswith("lm_head.weight is reshaped instead of transposed")


@pytest.mark.parametrize("style", foreign.STYLES)
def test_another_number_of_blocks_is_told(style: str) -> None:
    deep = small(n_embd=24, n_head=4, n_layer=4)
    arrays = random_arrays(deep) | ARRAYS
    report = npgpt.check(foreign.build(style, deep, arrays), IDS, model())
    assert report.problems == ["the model has 4 blocks, the reference has 3"]
    assert len(report.rows) > 30
    report = npgpt.check(foreign.build(style, CONFIG, ARRAYS), IDS, model(deep, arrays))
    assert report.problems == ["the model has 3 blocks, the reference has 4"]


def test_a_tensor_too_many_is_told() -> None:
    module = foreign.build("nanogpt", CONFIG, ARRAYS)
    module.value_head = torch.nn.Linear(24, 1)
    strange = "value_head.weight, value_head.bias are not in GPT-2"
    assert npgpt.check(module, IDS, model()).problems == [strange]
    report = npgpt.check(module, IDS)
    assert report.matches
    assert f"{strange}, and ignored." in report.notes


def test_a_module_whose_own_weights_are_not_finite_is_refused() -> None:
    broken = {**ARRAYS, "h.1.mlp.c_fc.bias": np.full_like(ARRAYS["h.1.mlp.c_fc.bias"], np.nan)}
    message = r"the module cannot be the reference: h\.1\.mlp\.c_fc\.bias has values that are not finite"
    with pytest.raises(npgpt.NpgptError, match=message):
        npgpt.check(foreign.build("nanogpt", CONFIG, broken), IDS)


def test_a_fresh_model_is_perturbed_for_the_run_alone() -> None:
    """The module's parameters keep their exact values and storage, and ties remain."""
    module = fresh()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    places = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    report = npgpt.check(module, IDS)
    assert report.matches, str(report)
    assert report.notes[:2] == [
        "The module is in training mode, and transformer.drop (Dropout, p = 0.1) applies dropout: it was run in "
        "evaluation mode, as after .eval().",
        "The module's own weights are taken as correct, so mistakes in loading them cannot be seen (weights=).",
    ]
    assert report.notes[2].startswith(
        "Parameters filled with one number, as in a fresh model, hide mistakes: both models were run with other values "
        "of h.*.ln_1.weight, h.*.ln_1.bias, h.*.attn.c_attn.bias and 7 more"
    )
    assert npgpt.check(module, IDS, copy.deepcopy(module)).matches
    module.transformer.ln_f.forward = None
    with pytest.raises(NpgptError, match="raises TypeError"):
        npgpt.check(module, IDS)
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    assert places == {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    assert module.lm_head.weight is module.transformer.wte.weight
    assert all(part.training for part in module.modules())


def without_bias(self: Any, x: Any) -> Any:
    return x @ self.weight


def bias_twice(self: Any, x: Any) -> Any:
    return x @ self.weight + 2 * self.bias


def without_gain(self: Any, x: Any) -> Any:
    return functional.layer_norm(x, x.shape[-1:], None, self.bias, self.eps)


def without_shift(self: Any, x: Any) -> Any:
    return functional.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


@pytest.mark.parametrize(
    ("path", "forward"),
    [
        ("attn.c_attn", without_bias),
        ("attn.c_proj", bias_twice),
        ("mlp.c_fc", without_bias),
        ("mlp.c_proj", bias_twice),
        ("ln_1", without_gain),
        ("ln_2", without_shift),
    ],
)
def test_mistakes_that_a_fresh_model_hides_are_seen(path: str, forward: Any) -> None:
    module = fresh()
    for block in module.transformer.h:
        replaced(block.get_submodule(path), forward)
    report = npgpt.check(module, IDS)
    assert report.first is not None
    assert report.first.stage == f"h.0.{path}"
    hidden = npgpt.check(module, IDS, perturb=False)
    assert hidden.matches
    assert any("all 0 in the reference" in note for note in hidden.notes)


def test_perturbing_in_half_precision_is_no_alarm() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert npgpt.check(fresh().to(dtype), IDS).matches


def test_what_a_part_needs_to_be_perturbed() -> None:
    """Parts of a model on their own use the same two functions."""
    norm = torch.nn.LayerNorm(8).train()
    changed = conditions.perturbation(norm)
    assert [name for name, _, _ in changed] == ["weight", "bias"]
    with conditions.as_judged(norm, [(parameter, data) for _, parameter, data in changed]):
        assert not norm.training
        assert norm.weight.std() > 0
    assert norm.training
    assert torch.equal(norm.weight, torch.ones(8))


def in_order(*layers: int) -> Any:
    """Return the book's forward with its blocks called in this order."""

    def forward(self: Any, ids: Any) -> Any:
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        for layer in layers:
            x = self.trf_blocks[layer](x)
        return self.out_head(self.final_norm(x))

    return forward


@pytest.mark.parametrize(
    ("layers", "problem", "name"),
    [
        ((0, 0, 0), "trf_blocks.1 and trf_blocks.2 never ran; trf_blocks.0 ran 3 times", "layer 0 in every place"),
        ((2, 1, 0), "the blocks ran in the order 2, 1, 0", "layers reversed"),
        ((0, 1, 1, 2), "trf_blocks.1 ran 2 times", "layer 1 run twice"),
        ((0, 2), "trf_blocks.1 never ran", "layer 1 missing"),
        ((0, 1, 2), None, None),
    ],
)
def test_blocks_that_never_run_or_in_another_order(
    layers: Sequence[int], problem: str | None, name: str | None
) -> None:
    """Stages are numbered by the order of calls, so that the search names the mistake too."""
    module = book()
    replaced(module, in_order(*layers))
    report = npgpt.check(module, IDS)
    assert report.problems == ([] if problem is None else [problem])
    assert (name is None) == report.matches
    assert name is None or name in " ".join(report.names)


def test_one_block_for_all_is_told() -> None:
    module = book()
    module.trf_blocks = torch.nn.ModuleList([module.trf_blocks[0]] * 3)
    report = npgpt.check(module, IDS)
    assert report.problems == [
        "trf_blocks.0, trf_blocks.1 and trf_blocks.2 are the same module, so its weights are used 3 times"
    ]
    assert report.first is None


def test_a_part_at_two_places_is_each_of_them_in_turn() -> None:
    """If a whole model runs twice, no block counts as called more often than another."""
    module = book()
    module.trf_blocks[2] = module.trf_blocks[0]
    replaced(module, lambda self, ids: [type(self).forward(self, ids) for _ in range(2)][1])
    assert npgpt.check(module, IDS).problems == [
        "trf_blocks.0 and trf_blocks.2 are the same module, so its weights are used 2 times"
    ]


def test_parts_that_stand_or_run_in_anothers_place() -> None:
    def norm_twice(self: Any, x: Any, use_cache: bool = False) -> Any:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm1(x))

    def query_twice(self: Any, x: Any, use_cache: bool = False) -> Any:
        rows, tokens, width = x.shape
        taken = (self.W_query(x), self.W_query(x), self.W_value(x))
        q, k, v = (part.view(rows, tokens, self.num_heads, -1).transpose(1, 2) for part in taken)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).reshape(rows, tokens, width))

    def problems(change: Any) -> list[str]:
        module = book()
        for block in module.trf_blocks:
            change(block)
        return npgpt.check(module, IDS).problems

    assert problems(lambda block: replaced(block, norm_twice)) == [
        "trf_blocks.*.norm2 never ran; trf_blocks.*.norm1 ran 2 times"
    ]
    assert problems(lambda block: replaced(block.att, query_twice)) == [
        "trf_blocks.*.att.W_key never ran; trf_blocks.*.att.W_query ran 2 times"
    ]
    assert problems(lambda block: setattr(block, "norm2", block.norm1)) == [
        "trf_blocks.*.norm1 and trf_blocks.*.norm2 are the same module, so its weights are used 2 times"
    ]


def test_weights_that_are_used_by_other_means_are_no_alarm() -> None:
    """Correct models may call few or none of their parts, or process tokens one at a time."""

    def norm(part: Any, x: Any) -> Any:
        return functional.layer_norm(x, x.shape[-1:], part.scale, part.shift)

    def by_weights(self: Any, ids: Any) -> Any:
        x = self.tok_emb.weight[ids] + self.pos_emb.weight[: ids.shape[1]]
        for block in self.trf_blocks:
            x = x + block.att(norm(block.norm1, x))
            x = x + block.ff(norm(block.norm2, x))
        return norm(self.final_norm, x) @ self.out_head.weight.T

    def token_by_token(self: Any, ids: Any) -> Any:
        whole = type(self).forward
        return torch.cat([whole(self, ids[:, : end + 1])[:, -1:] for end in range(ids.shape[1])], dim=1)

    module = book()
    replaced(module, by_weights)
    report = npgpt.check(module, IDS)
    assert report.matches, str(report)
    assert "trf_blocks.*.norm1 and trf_blocks.*.norm2 never ran as a module" in " ".join(report.notes)
    module = book()
    replaced(module, token_by_token)
    report = npgpt.check(module, IDS)
    assert report.matches, str(report)
    state = {name: tensor.clone() for name, tensor in book().state_dict().items()}
    inner = book()
    replaced(module, lambda self, ids: torch.func.functional_call(inner, state, (ids,)))
    report = npgpt.check(module, IDS)
    assert report.matches
    assert "None of the model's parts ran as a module: only the logits are compared." in report.notes


def test_dropout_that_evaluation_does_not_stop_ends_the_check() -> None:
    module = book()
    replaced(module, lambda self, ids: functional.dropout(type(self).forward(self, ids), 0.1))
    report = npgpt.check(module, IDS, model())
    assert (report.rows, report.matches) == ([], False)
    assert report.verdict == "differs: its outputs differ from run to run: dropout is on, or something else is random"


def test_a_cache_that_is_kept_is_told_as_such() -> None:
    module = book()
    replaced(module, lambda self, ids: type(self).forward(self, ids, use_cache=True))
    verdict = npgpt.check(module, IDS, model()).verdict
    assert "state is kept between calls (a cache that is not reset?)" in verdict
    assert "dropout" not in verdict


@pytest.mark.parametrize(
    "call",
    [
        lambda module: lambda ids: module(ids)[0],
        lambda module: module.forward,
        lambda module: lambda ids: module(ids),
        lambda module: lambda ids: (torch.tensor(3.0), module(ids)[0]),
        lambda module: lambda ids, targets: (module(ids)[0], functional.cross_entropy(module(ids)[0].mT, targets)),
    ],
)
def test_callables_that_want_torch_ids(call: Any) -> None:
    report = npgpt.check(call(foreign.build("nanogpt", CONFIG, ARRAYS)), IDS, model())
    assert report.matches, str(report)
    assert (
        "It was called with ids as a torch LongTensor [B, T], since it raises an error for a NumPy array"
        in " ".join(report.notes)
    )


def test_a_module_that_wants_targets() -> None:
    module = book()
    replaced(module, lambda self, ids, targets: (type(self).forward(self, ids), targets))
    assert npgpt.check(module, IDS, model()).matches


class Wrapper(BASE):  # type: ignore[misc]
    """A training framework's wrapper, with the model in an attribute."""

    def __init__(self, attribute: str, inner: Any) -> None:
        super().__init__()
        self.attribute = attribute
        self.add_module(attribute, inner)

    def forward(self, ids: Any) -> Any:
        return getattr(self, self.attribute)(ids)


@pytest.mark.parametrize("attribute", ["model", "net"])
@pytest.mark.parametrize("style", foreign.STYLES)
def test_a_model_in_an_attribute(attribute: str, style: str) -> None:
    report = npgpt.check(Wrapper(attribute, foreign.build(style, CONFIG, ARRAYS)), IDS, model())
    assert report.matches, str(report)
    assert len(report.rows) > 30


def test_a_compiled_module_is_seen_and_perturbed(recwarn: pytest.WarningsRecorder) -> None:
    report = npgpt.check(torch.compile(fresh(), backend="eager"), IDS)
    assert report.matches, str(report)
    assert len(report.rows) > 30
    assert not recwarn.list


class Hidden(BASE):  # type: ignore[misc]
    """A block whose parts are hidden, although its state dict has their names."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.__dict__["inner"] = inner

    def forward(self, x: Any, use_cache: bool = False) -> Any:
        return self.inner(x)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.inner.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)


def test_a_block_whose_parts_are_not_seen() -> None:
    module = book()
    module.trf_blocks[1] = Hidden(module.trf_blocks[1])
    report = npgpt.check(module, IDS, model())
    assert report.matches, str(report)
    assert len(report.rows) == 30


def said(theirs: Any, weights: Any) -> Report:
    return npgpt.check(theirs, IDS, weights)


def test_weights_from_a_module_or_a_state_dict() -> None:
    module = foreign.build("nanogpt", CONFIG, ARRAYS)
    for weights in (module, module.state_dict(), {"model": module.state_dict(), "iter_num": 3}):
        assert said(book(), weights).matches
    wrong = foreign.build("nanogpt", CONFIG, ARRAYS, ("attn.c_proj transposed",))
    assert said(book(), wrong).problems == ["h.*.attn.c_proj.weight are transposed"]
    with torch.no_grad():
        logits = module(torch.tensor(IDS))[0]
    assert said(logits, module).matches


def test_what_transformers_returns_is_taken_whole() -> None:
    module = foreign.build("transformers", CONFIG, ARRAYS)
    with torch.no_grad():
        whole = module(torch.tensor(IDS), labels=torch.tensor(IDS), output_hidden_states=True, output_attentions=True)
    report = said(whole, model())
    assert report.matches, str(report)
    assert {"embedding", "h.0", "h.2.attn.weights", "ln_f", "logits"} <= {row.stage for row in report.rows}
