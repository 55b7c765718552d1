"""The oracle names the mistakes of implementations outside npgpt, and raises no false alarms."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import parameters
from npgpt.cli import main
from npgpt.config import Config
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.oracle.comparison import compare
from npgpt.oracle.textbook import Pass, textbook
from npgpt.oracle.theirs import cases
from tests.support.models import no_text, random_arrays, random_ids, small
from tests.support.reports import said

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")
foreign = pytest.importorskip("tests.support.foreign", reason="extra parity is not installed")
table = pytest.importorskip("tests.support.oracle_table", reason="extra parity is not installed")

CONFIG = small(n_embd=24, n_head=4)
ARRAYS = random_arrays(CONFIG)
REFERENCE = LanguageModel("reference", CONFIG, parameters.from_arrays(CONFIG, ARRAYS), no_text("none"))
IDS = random_ids(CONFIG, (2, 9))
ENTRIES = [(title, entry.name) for title, config in table.MODELS.items() for entry in table.entries(config)]


@pytest.mark.parametrize(("model", "name"), ENTRIES)
def test_every_mistake_in_every_implementation(model: str, name: str) -> None:
    for style, stages in itertools.product(foreign.STYLES, (True, False)):
        found = table.report(style, table.MODELS[model], (name,), stages)
        cell = table.verdict(found, name)
        assert not cell.startswith("MISSED"), (style, stages, cell, str(found))


def test_the_committed_table_has_every_entry() -> None:
    text = (Path(__file__).parent / "ORACLE.md").read_text("utf-8")
    assert "MISSED" not in text
    assert all(f"| {name} |" in text for _, name in ENTRIES)


@pytest.mark.parametrize("model", table.MODELS)
@pytest.mark.parametrize("style", foreign.STYLES)
@pytest.mark.parametrize("name", foreign.CACHE)
def test_every_mistake_of_a_cache(model: str, style: str, name: str) -> None:
    config, chunks = table.MODELS[model], (5, 2, 1, 1)
    arrays, ids = random_arrays(config), random_ids(config, (1, 9))
    single = {key: array.astype(np.float32) for key, array in arrays.items()}
    logits = foreign.chunked(style, config, single, chunks, ids, (name,))
    found = compare(config, arrays, cases({"logits": logits}, config, ids, chunks=chunks))
    assert found.names == [name], str(found)
    right = foreign.chunked(style, config, single, chunks, ids)
    assert compare(config, arrays, cases({"logits": right}, config, ids, chunks=chunks), entries=[]).matches


def random_config(rng: random.Random) -> Config:
    heads = rng.choice((1, 2, 3, 4))
    return small(
        n_embd=heads * rng.choice((4, 7, 16)),
        n_head=heads,
        n_layer=rng.choice((1, 2, 4)),
        n_inner=rng.choice((None, 50)),
    )


@pytest.mark.parametrize("number", range(200))
def test_never_an_alarm_over_correct_implementations(number: int) -> None:
    """Correct runs vary in dtype (float32, float16, bfloat16), attention (eager, SDPA), batch and cache."""
    rng = random.Random(number)
    config = random_config(rng)
    arrays = random_arrays(config, number)
    ids = random_ids(config, (rng.choice((1, 3)), rng.choice((1, 2, 9, 20))), number)
    dtype = ("float32", "float16", "bfloat16")[number % 3]
    style = foreign.STYLES[number % 2]
    if config.n_inner is not None or number % 4 == 0:
        style = "transformers"
    if style == "transformers":
        from tests.support import peers

        module = peers.transformers_model(config, {name: array.astype(np.float32) for name, array in arrays.items()})
        if number % 8 == 0:
            module.set_attn_implementation("sdpa")
    else:
        module = foreign.build(style, config, arrays)
    module = module.to(getattr(torch, dtype))
    if style == "transformers" and number % 5 == 0 and ids.shape[1] > 2:
        cut, past = ids.shape[1] // 2, None
        logits: list[Any] = []
        for part in (ids[:, :cut], ids[:, cut:-1], ids[:, -1:]):
            with torch.no_grad():
                output = module(torch.tensor(part), past_key_values=past, use_cache=True) if part.size else None
            if output is not None:
                past, logits = output.past_key_values, [*logits, output.logits.float().numpy()]
        theirs = {"logits": np.concatenate(logits, axis=1)}
    else:
        theirs = foreign.capture(module, style, ids)
    # module weights are rounded to its dtype, which its own tolerance accounts for
    report = compare(config, arrays, cases(theirs, config, ids), dtype, entries=[])
    assert report.matches, str(report)


def visible_pairs(config: Config, count: int) -> list[tuple[str, str]]:
    """Return pairs of mistakes, each of which clearly changes the result of the other."""
    rng = random.Random(0)
    found: list[tuple[str, str]] = []
    arrays, ids = random_arrays(config), random_ids(config, (1, table.TOKENS))
    skip = ("BOS", "last token", "layer", "log", "cache", "n_head", "vocabulary")
    entries = [entry for entry in table.entries(config) if not entry.name.startswith(skip)]
    book = textbook(config, arrays)
    usual = Pass(book, ids)["logits"]

    def gap(a: Any, b: Any) -> float:
        return float(np.sqrt(np.square(a - b).mean() / np.square(usual).mean()))

    while len(found) < count:
        one, two = rng.sample(entries, 2)
        first, second = (Pass(entry.change(book), ids)["logits"] for entry in (one, two))
        both, turned = (Pass(b.change(a.change(book)), ids)["logits"] for a, b in ((one, two), (two, one)))
        clear = 5 * 6 * 3e-7  # five tolerances; roundings are 6, near 3e-7
        if min(gap(both, usual), gap(both, first), gap(both, second)) > 10 * clear and gap(both, turned) < 1e-12:
            found.append((one.name, two.name))
    return found


PAIRS = table.MODELS["3 blocks, 4 × 6"]


@pytest.mark.parametrize(("stages", "least"), [(True, 95), (False, 80)])
def test_two_mistakes_at_once(stages: bool, least: int) -> None:
    missed = []
    for number, pair in enumerate(visible_pairs(PAIRS, 100)):
        style = foreign.STYLES[number % 3]
        found = table.report(style, PAIRS, pair, stages)
        names = {entry.name for finding in found.diagnosis.findings for entry in finding.mistakes}
        if not set(pair) <= names:
            missed.append((style, pair, found.verdict))
    assert len(missed) <= 100 - least, (len(missed), missed)


@pytest.mark.parametrize("style", ["llms-from-scratch", "nanogpt", "transformers"])
def test_a_module_as_it_stands(style: str) -> None:
    """Without a file, the module is run and its own weights are the reference."""
    module = foreign.build(style, CONFIG, ARRAYS)
    report = npgpt.check(module, IDS)
    assert report.matches, str(report)
    assert len(report.rows) > 20
    assert "mistakes in loading them cannot be seen" in str(report)
    wrong = npgpt.check(foreign.build(style, CONFIG, ARRAYS, ("heads merged without transpose",)), IDS)
    assert wrong.names == ["heads merged without transpose"]
    assert wrong.first is not None
    assert wrong.first.stage == "h.0.attn.merged"


@pytest.mark.parametrize("style", ["llms-from-scratch", "nanogpt", "transformers"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("attn.c_proj transposed", "transposed"),
        ("q, k, v weights transposed", "transposed in each of q, k, v"),
        ("all biases dropped", "all 0"),
        ("weights rounded to float16", "rounded to float16"),
        ("layers 0 and 1 swapped", "wrong order"),
    ],
)
def test_loading_mistakes_are_named_against_the_reference(style: str, name: str, said: str) -> None:
    module = foreign.build(style, CONFIG, ARRAYS, (name,))
    report = npgpt.check(module, IDS, REFERENCE)
    assert report.code == 1
    assert any(said in problem for problem in report.problems), report.problems
    assert npgpt.check(foreign.build(style, CONFIG, ARRAYS), IDS, REFERENCE).matches


def test_a_module_that_drops_out_is_run_in_evaluation_mode_and_put_back() -> None:
    """Each part's training flag is restored separately, as some may be frozen, even if the run fails."""
    module = foreign.build("llms-from-scratch", CONFIG, ARRAYS)
    module.drop_emb.p = 0.1
    module.train()
    module.trf_blocks[1].eval()
    flags = [part.training for part in module.modules()]
    report = npgpt.check(module, IDS)
    assert report.matches, str(report)
    assert report.notes[0] == (
        "The module is in training mode, and drop_emb (Dropout, p = 0.1) applies dropout: it was run in evaluation "
        "mode, as after .eval()."
    )
    assert [part.training for part in module.modules()] == flags
    module.out_head.forward = None
    with pytest.raises(NpgptError, match="GPTModel raises TypeError"):
        npgpt.check(module, IDS)
    assert [part.training for part in module.modules()] == flags
    quiet = foreign.build("llms-from-scratch", CONFIG, ARRAYS).train()
    assert not any("training mode" in note for note in npgpt.check(quiet, IDS).notes)


def test_what_is_no_whole_gpt2_is_refused() -> None:
    body = transformers.GPT2Model(transformers.GPT2Config(vocab_size=40, n_embd=24, n_layer=1, n_head=4)).eval()
    with pytest.raises(NpgptError, match=r"there are no logits in its output \(last_hidden_state"):
        npgpt.check(body, IDS)
    with pytest.raises(NpgptError, match="Linear is not a GPT-2 that npgpt knows"):
        npgpt.check(torch.nn.Linear(3, 3), IDS)


def test_weights_of_another_shape_are_told() -> None:
    report = npgpt.check(foreign.build("nanogpt", CONFIG, ARRAYS), IDS, "austen")
    assert report.code == 1
    assert report.verdict.startswith("differs: wte.weight is of shape [40, 24], not [4096, 192]; and ")


def test_the_books_own_model() -> None:
    ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch 1.0.19 is not installed")
    torch.manual_seed(0)
    book = {"vocab_size": 50257, "context_length": 32, "emb_dim": 48, "n_heads": 4, "n_layers": 2}
    model = ch04.GPTModel(book | {"drop_rate": 0.0, "qkv_bias": False}).eval()
    report = npgpt.check(model, "Every effort moves you")
    assert report.matches, str(report)
    for block in model.trf_blocks:
        block.ff.layers[1] = torch.nn.ReLU()
    assert npgpt.check(model, "Every effort moves you").names == ["ReLU"]


def test_parts_of_the_book() -> None:
    ch03 = pytest.importorskip("llms_from_scratch.ch03", reason="llms-from-scratch 1.0.19 is not installed")
    ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch 1.0.19 is not installed")
    torch.manual_seed(0)
    attention = ch03.MultiHeadAttention(24, 24, 32, 0.0, 4, qkv_bias=True)
    assert npgpt.check_part("attention", attention).matches
    attention.num_heads, attention.head_dim = 2, 12
    assert npgpt.check_part("attention", attention, n_head=4).names == ["n_head 2"]
    chapter = ch03.MultiHeadAttention(3, 2, 32, 0.0, num_heads=2)  # as the book builds it: no bias, another width
    assert npgpt.check_part("attention", chapter).matches
    dropping = ch03.MultiHeadAttention(24, 24, 32, 0.5, 4)
    report = npgpt.check_part("attention", dropping)
    assert report.matches
    assert "it was run in evaluation mode, as after .eval()" in said(report)
    assert dropping.training
    norm = ch04.LayerNorm(24)
    assert npgpt.check_part("layer_norm", norm).matches
    norm.eps = 1e-3
    assert npgpt.check_part("layer_norm", norm).names == ["LayerNorm epsilon 1e-3"]
    assert npgpt.check_part("gelu", ch04.GELU()).matches
    assert npgpt.check_part("gelu", torch.nn.GELU()).names == ["erf GELU"]


BASE: Any = torch.nn.Module


class Norm(BASE):  # type: ignore[misc]
    """A common homemade layer norm: gamma and beta, optionally with the Annotated Transformer's standard deviation."""

    def __init__(self, names: tuple[str, str], deviation: bool = False) -> None:
        super().__init__()
        self.names, self.deviation = names, deviation
        for name, number in zip(names, (1.0, 0.0), strict=True):
            setattr(self, name, torch.nn.Parameter(torch.full((24,), number)))

    def forward(self, x: Any) -> Any:
        gain, bias = (getattr(self, name) for name in self.names)
        centred, variance = x - x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (
            gain * centred / ((x.std(-1, keepdim=True) + 1e-5) if self.deviation else (variance + 1e-5).sqrt()) + bias
        )


@pytest.mark.parametrize("names", [("gamma", "beta"), ("a_2", "b_2"), ("scale", "shift"), ("gain", "bias")])
def test_layer_norms_by_other_names_are_perturbed_and_put_back(names: tuple[str, str]) -> None:
    """Without perturbation, a gain of 1 and a bias of 0 would hide that they are not applied."""
    norm: Any = Norm(names)
    report = npgpt.check_part("layer_norm", norm)
    assert report.matches, str(report)
    assert f"both models were run with other values of {names[0]}, {names[1]}. " in said(report)
    assert (getattr(norm, names[0]) == 1).all()
    assert (getattr(norm, names[1]) == 0).all()
    assert "fresh" not in str(npgpt.check_part("layer_norm", norm, perturb=False))
    assert npgpt.check_part("layer_norm", Norm(names, deviation=True)).names == ["standard deviation plus epsilon"]
    norm.forward = lambda x: torch.nn.functional.layer_norm(x, (24,))
    assert npgpt.check_part("layer_norm", norm).names == ["LayerNorm gain and bias dropped"]


def test_what_is_no_gpt2s_parameter_stays_as_it_is() -> None:
    """A scale of ones after an MLP has no effect as long as it is not perturbed."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(24, 96), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(96, 24)
    mlp = torch.nn.Sequential(*layers)
    mlp.scale = torch.nn.Parameter(torch.ones(24))
    mlp.forward = lambda x: layers[2](layers[1](layers[0](x))) * mlp.scale
    torch.nn.init.zeros_(layers[0].bias)
    report = npgpt.check_part("mlp", mlp)
    assert report.matches, str(report)
    assert "both models were run with other values of 0.bias. " in said(report)


def test_an_mlp_in_sequence_and_torchs_own_functions() -> None:
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(24, 96),
        torch.nn.GELU(approximate="tanh"),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(96, 24),
    ]
    assert npgpt.check_part("mlp", torch.nn.Sequential(*layers)).matches
    assert npgpt.check_part("mlp", torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[3])).names == ["erf GELU"]
    assert npgpt.check_part("gelu", torch.nn.functional.gelu).names == ["erf GELU"]
    assert npgpt.check_part("gelu", lambda x: torch.nn.functional.gelu(x, approximate="tanh")).matches


def test_an_attention_with_a_short_context() -> None:
    ch03 = pytest.importorskip("llms_from_scratch.ch03", reason="llms-from-scratch 1.0.19 is not installed")
    torch.manual_seed(0)
    report = npgpt.check_part("attention", ch03.MultiHeadAttention(3, 2, 6, 0.0, num_heads=2))
    assert report.matches
    assert "It was given 6 tokens in a tensor" in str(report)


def test_what_torch_saves_without_a_name(tmp_path: Path) -> None:
    """A bare tensor and a dictionary with transformers' tuples are both read."""
    reference = LanguageModel("model", CONFIG, parameters.from_arrays(CONFIG, ARRAYS), no_text("none"))
    with torch.no_grad():
        output = foreign.build("transformers", CONFIG, ARRAYS)(torch.tensor(IDS), output_hidden_states=True)
    torch.save(output.logits, tmp_path / "logits.pt")
    assert npgpt.check(tmp_path / "logits.pt", IDS, reference).matches
    torch.save((output.logits, torch.tensor(1.5)), tmp_path / "tuple.pt")
    assert npgpt.check(tmp_path / "tuple.pt", IDS, reference).matches
    torch.save({"logits": output.logits, "hidden_states": output.hidden_states, "loss": 1.0}, tmp_path / "all.pt")
    report = npgpt.check(tmp_path / "all.pt", IDS, reference)
    assert report.matches
    assert len(report.rows) == CONFIG.n_layer + 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_that_torch_writes(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    single = {name: array.astype(np.float32) for name, array in ARRAYS.items()}
    model = LanguageModel("model", CONFIG, parameters.from_arrays(CONFIG, single), no_text("none"))
    npgpt.save(model, tmp_path / "model")
    for mistakes, code in (((), 0), (("MLP residual missing",), 1)):
        module = foreign.build("transformers", CONFIG, ARRAYS, mistakes).to(getattr(torch, dtype))
        with torch.no_grad():
            output = module(torch.tensor(IDS), output_hidden_states=True)
        given = {"input_ids": torch.tensor(IDS), "logits": output.logits}
        given |= {f"hidden_states.{number}": hidden for number, hidden in enumerate(output.hidden_states)}
        torch.save(given, tmp_path / "theirs.pt")
        assert (
            main(["check", str(tmp_path / "theirs.pt"), "--model", str(tmp_path / "model"), "--their-dtype", dtype])
            == code
        )
        assert ("MLP residual missing" in " ".join(capsys.readouterr().out.partition("\n\n")[0].split())) == bool(code)
