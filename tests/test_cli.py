"""The command line, run as a process."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import cli
from npgpt.checkpoints import configs, inspect, safetensors
from tests.support.austen import CARD_GREEDY, CARD_IDS, CARD_PROMPT, CARD_SHA256
from tests.support.command import COMMAND, ROOT, here, refused, run
from tests.support.models import random_arrays, small, store
from tests.support.thorough import examples


def test_generate_prints_what_the_card_says(tmp_path: Path) -> None:
    code, out, error = here("generate", CARD_PROMPT, "--temperature", "0", "--max-tokens", "40", cwd=tmp_path)
    assert (code, out, error) == (0, CARD_GREEDY + "\n", "")


def test_same_seed_same_text() -> None:
    """A new process and this one print the same text."""
    arguments = ("generate", CARD_PROMPT, "--seed", "1", "--max-tokens", "20")
    first = run(*arguments)
    assert first == here(*arguments)
    assert first[0] == 0


def test_generate_json() -> None:
    arguments = ["--json", "--temperature", "0", "--max-tokens", "5", "--dtype", "float64", "--threads", "1"]
    code, out, _ = run("generate", CARD_PROMPT, *arguments, "--seed", "9")
    report = json.loads(out)
    assert code == 0
    assert report["prompt_ids"] == CARD_IDS
    assert report["prompt"] + report["text"] == CARD_GREEDY[: len(report["prompt"] + report["text"])]
    assert (len(report["token_ids"]), report["finish"], report["seed"], report["dtype"]) == (5, "length", 9, "float64")
    assert report["tokens_per_second"] > 0
    assert report["seconds_to_first_token"] > 0


def test_without_a_seed_every_run_is_another() -> None:
    command = ["generate", CARD_PROMPT, "--json", "--max-tokens", "12"]
    reports = [json.loads(here(*command)[1]) for _ in range(2)]
    assert reports[0]["seed"] != reports[1]["seed"]
    assert reports[0]["text"] != reports[1]["text"]
    again = json.loads(here(*command, "--seed", str(reports[0]["seed"]))[1])
    assert again["text"] == reports[0]["text"]


def test_end_of_text_ends_it_unless_ignored(tmp_path: Path) -> None:
    """The model has 257 ids and always predicts the last, <|endoftext|>."""
    config = small(vocab_size=257)
    arrays = random_arrays(config, dtype="float32")
    arrays["ln_f.weight"][:], arrays["wte.weight"][256] = 0, 100 * arrays["ln_f.bias"]
    safetensors.write(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps(configs.to_dict(config)))
    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (tmp_path / "vocab.tiktoken").write_bytes(ranks)
    arguments = ["generate", "a", "--model", str(tmp_path), "--temperature", "0", "--json", "--max-tokens", "3"]
    report = json.loads(here(*arguments)[1])
    assert (report["finish"], report["token_ids"], report["text"]) == ("end_of_text", [], "")
    report = json.loads(here(*arguments, "--ignore-eos")[1])
    assert (report["finish"], report["token_ids"], report["text"]) == ("length", [256] * 3, "<|endoftext|>" * 3)


def test_verbose_tells_counts_times_and_the_seed() -> None:
    code, _, error = here("generate", CARD_PROMPT, "-v", "--max-tokens", "3", "--seed", "4")
    assert code == 0
    assert error.startswith("npgpt: 12 prompt tokens, 3 generated (length), seed 4; 0.")
    counts, tuned = error.splitlines()
    assert counts.endswith(" tokens/s")
    assert re.match(r"npgpt: OPENBLAS_THREAD_TIMEOUT=20 .*; freed memory is ", tuned)


def test_prompt_from_standard_input_is_taken_as_it_is() -> None:
    code, out, _ = here("generate", "-", "--json", "--max-tokens", "1", stdin=b"It is a truth\n")
    assert code == 0
    assert json.loads(out)["prompt"] == "It is a truth\n"


def test_an_empty_prompt_and_the_special_token() -> None:
    code, out, _ = here("generate", "--json", "--max-tokens", "1")
    assert (code, json.loads(out)["prompt_ids"]) == (0, [4095])
    _, out, _ = here("generate", "<|endoftext|>", "--special", "--json", "--max-tokens", "1")
    assert json.loads(out)["prompt_ids"] == [4095]
    _, out, _ = here("generate", "<|endoftext|>", "--json", "--max-tokens", "1")
    assert 4095 not in json.loads(out)["prompt_ids"]


SAMPLES = ("--samples", "3", "--seed", "12", "--max-tokens", "20", "--stop", " the", "--dtype", "float64")


def test_samples() -> None:
    """Each sample equals the one from its own seed alone, and they are printed in order, though the first ends last."""
    code, out, error = here("generate", "It is a truth", *SAMPLES)
    alone = [
        here("generate", "It is a truth", *SAMPLES, "--samples", "1", "--seed", str(seed))[1] for seed in (12, 13, 14)
    ]
    assert (code, error) == (0, "")
    assert out == "".join(f"--- sample {n} of 3, seed {n + 11} ---\n{text}" for n, text in enumerate(alone, 1))
    assert all(text.startswith("It is a truth") for text in alone)
    assert len(set(alone)) == 3


def test_samples_as_json_are_a_line_each() -> None:
    code, out, error = here("generate", "It is a truth", *SAMPLES, "--json", "-v")
    reports = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(report["sample"], report["seed"]) for report in reports] == [(1, 12), (2, 13), (3, 14)]
    assert [report["finish"] for report in reports] == ["length", "stop", "stop"]
    assert len(reports[0]["token_ids"]) > len(reports[2]["token_ids"]) > len(reports[1]["token_ids"])
    for report in reports:
        single = json.loads(
            here("generate", "It is a truth", *SAMPLES, "--samples", "1", "--seed", str(report["seed"]), "--json")[1]
        )
        assert single.keys() == report.keys()
        for key in ("prompt_ids", "text", "token_ids", "finish", "seed"):
            assert single[key] == report[key]
        assert single["sample"] == 1
    counts = ", ".join(f"{len(report['token_ids'])} generated ({report['finish']})" for report in reports)
    assert error.startswith(f"npgpt: 4 prompt tokens, {counts}, seed 12 to 14; 0.")
    assert error.splitlines()[0].endswith(" tokens/s")


def test_samples_on_ids_to_the_contexts_end(bare: Path) -> None:
    arguments = ("--model", str(bare), "--ids", "1,2,3", "--max-tokens", "99", "--samples", "2", "--temperature", "0")
    code, out, error = here("generate", *arguments)
    first, second = (part.partition(" ---\n")[2] for part in out.split("--- sample ")[1:])
    assert code == 0
    same, full = error.splitlines()
    assert same == "npgpt: --temperature 0 is greedy: the 2 samples are the same text"
    assert full == "npgpt: the context of 24 tokens is full"
    assert first == second
    assert len(first.split()) == 25


def test_repetition_penalty() -> None:
    def text(*penalty: str) -> str:
        return here("generate", CARD_PROMPT, "--temperature", "0", "--max-tokens", "20", *penalty)[1].rstrip("\n")

    assert CARD_GREEDY.startswith(text())
    assert text("--repetition-penalty", "1") == text() != text("--repetition-penalty", "1.5")


def test_stop() -> None:
    code, out, _ = here("generate", CARD_PROMPT, "--temperature", "0", "--stop", "not here", "--stop", " able to")
    assert (code, out) == (0, CARD_GREEDY[: CARD_GREEDY.index(" able to")] + "\n")


def test_the_contexts_end_is_said() -> None:
    code, _, error = here("generate", " the" * 250, "--temperature", "0", "--max-tokens", "50")
    assert (code, error) == (0, "npgpt: the context of 256 tokens is full\n")


def test_a_prompt_longer_than_the_context() -> None:
    error = refused("generate", " the" * 300)
    assert "the prompt has 300 tokens, the context holds 256; --keep-last cuts its head" in error
    code, out, error = here("generate", " the" * 300 + " end", "--keep-last", "--max-tokens", "6", "--json")
    report = json.loads(out)
    assert code == 0
    assert (len(report["prompt_ids"]), len(report["token_ids"])) == (251, 6)
    assert report["prompt"].endswith(" the end")
    assert error == "npgpt: the prompt's first 50 of 301 tokens are cut, 251 kept in the context of 256\n"


def test_a_model_without_text_runs_on_ids(bare: Path) -> None:
    code, out, _ = here("generate", "--model", str(bare), "--ids", "1,2,3", "--max-tokens", "4", "--temperature", "0")
    ids = [int(word) for word in out.split()]
    assert code == 0
    assert (ids[:3], len(ids)) == ([1, 2, 3], 7)
    error = refused("generate", "--model", str(bare), "hello")
    assert "its 40 ids are not GPT-2's 50257" in error


def test_tokens() -> None:
    code, out, error = here("tokens", "--model", "gpt2", "Hello, wörld 🤯")
    assert code == 0
    assert out.splitlines()[:4] == ["15496  'Hello'", "   11  ','", "  266  ' w'", "30570  'ör'"]
    assert "\n12520  ' \\xf0\\x9f'\n" in out
    assert "50257 ids" in error
    code, out, _ = here("tokens", CARD_PROMPT, "--json")
    report = json.loads(out)
    assert report["ids"] == CARD_IDS
    assert "".join(report["pieces"]) == CARD_PROMPT


def test_tokens_reads_standard_input() -> None:
    assert run("tokens", "-", "--model", "gpt2", stdin=b"hello")[1] == "31373  'hello'\n"


def test_inspect() -> None:
    code, out, error = here("inspect")
    assert (code, error) == (0, "")
    for text in (
        "austen: GPT-2 of 3,505,152 parameters, no published size",
        "192 = 6 heads × 32",
        "6 blocks",
        "786,432   22.4%",
        CARD_SHA256,
        "7,016,832 bytes",
        "76 float16; converted to float32 at load",
        "all finite",
    ):
        assert text in out


def test_inspect_tells_how_attention_is_scaled(tmp_path: Path) -> None:
    store(tmp_path, small(scale_attn_weights=False))
    out = here("inspect", str(tmp_path))[1]
    assert "scale_attn_weights False, scale_attn_by_inverse_layer_idx False" in out


def test_a_verb_runs_in_a_thread_too() -> None:
    """Only the main thread may handle signals."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(here, "tokens", "a", "--model", "gpt2").result()[:2] == (0, "   64  'a'\n")


def test_inspect_names_what_is_wrong(tmp_path: Path) -> None:
    arrays = random_arrays(small(), dtype="float32")
    arrays["wpe.weight"][0, 0] = np.nan
    safetensors.write(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps(configs.to_dict(small(n_inner=84)) | {"rope": 1}))
    code, out, _ = here("inspect", str(tmp_path))
    assert code == 0
    assert "NOT FINITE: wpe.weight has 1 NaN and 0 infinite" in out
    assert "rope (in config.json; not used)" in out
    assert "21 = 3 heads × 7" in out
    assert "used where they lie, not copied" in out
    assert "21 = 7 heads × 3" in here("inspect", str(tmp_path), "--n-head", "7")[1]
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    odd = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(odd)
    assert f"{len(arrays)} lie on no multiple of their size and are copied at load" in here("inspect", str(tmp_path))[1]


@pytest.mark.parametrize("verb", ["generate", "tokens", "inspect"])
def test_help_has_an_example_and_fits_a_screen(verb: str) -> None:
    code, out, _ = here(verb, "--help", COLUMNS="80")
    assert code == 0
    assert f"example: npgpt {verb}" in out
    assert len(out.splitlines()) <= 40


def test_version_and_help() -> None:
    code, out, error = run("--version", OPENBLAS_NUM_THREADS="1")
    assert (code, error) == (0, "")
    assert re.fullmatch(
        rf"npgpt {npgpt.__version__}\nNumPy {re.escape(np.__version__)}, \S+ [\d.]+\S*, threads: 1\n", out
    )
    code, out, _ = here("--help")
    assert (code, "example: npgpt generate" in out) == (0, True)
    assert here() == (2, out, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "there is no verb 'nonsense' (see npgpt --help)"),
        (["generate", "a", "--max-tokens", "x"], "--max-tokens"),
        (["generate", "a", "--max-tokens", "-1"], "max_tokens must be at least 0, not -1"),
        (["generate", "a", "--temperature", "-1"], "temperature must be 0 (greedy) or above, not -1.0"),
        (["generate", "a", "--temperature", "nan"], "not nan"),
        (["generate", "a", "--top-k", "-1"], "top-k, the number of tokens to keep, must be at least 0, not -1"),
        (["generate", "a", "--top-p", "2"], "not 2.0"),
        (["generate", "a", "--min-p", "-1"], "not -1.0"),
        (["generate", "a", "--repetition-penalty", "0"], "repetition-penalty must be a finite number above 0, not 0.0"),
        (["generate", "a", "--samples", "0"], "samples must be at least 1, not 0"),
        (["generate", "a", "--samples", "2", "--seed", str(2**64 - 1)], "the last sample's seed"),
        (["generate", "a", "--seed", "-5"], "a seed must be at least 0, not -5"),
        (["generate", "a", "--stop", ""], "stop string must not be empty"),
        (["generate", "a", "--threads", "0"], "--threads must be at least 1, not 0"),
        (["generate", "a", "--dtype", "float16"], "float16"),
        (["generate", "a", "--ids", "1"], "not both"),
        (["generate", "--ids", "1,x"], "'1,x'"),
        (["generate", "--ids", "1,5000"], "token id 5000 at position [1] is out of range"),
        (["generate", "--ids", "1,-1"], "token id -1"),
        (["generate", "--ids", "99999999999999999999"], "integers"),
        (["generate", "a", "--model", "no/such/model/here"], "no/such/model/here does not exist"),
        (["generate", "a", "--n-head", "7"], "192 / 7 = 27.43"),
        (["inspect", "/etc/hostname"], "/etc/hostname"),
        (["tokens", "a", "--model", ""], "a model's name must be a folder, a file, or a name such as gpt2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_a_published_model_that_is_not_here(tmp_path: Path) -> None:
    error = refused("generate", "a", "--model", "gpt2", cwd=tmp_path, HF_HUB_CACHE=str(tmp_path), NPGPT_WEIGHTS="")
    assert "no model 'gpt2' here" in error
    assert "put model.safetensors and config.json into weights/gpt2/" in error


def test_the_swap_of_depth_and_heads(tmp_path: Path) -> None:
    config = configs.to_dict(npgpt.PUBLISHED["gpt2-xl"]) | {"n_layer": 25, "n_head": 48}
    safetensors.write(tmp_path / "model.safetensors", random_arrays(small(), dtype="float32"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = refused("inspect", str(tmp_path))
    assert "48 is the n_layer of gpt2-xl" in error
    assert "its n_head is 25: 1600 = 25 × 64" in error


def test_input_that_is_not_utf8() -> None:
    assert "not UTF-8: byte 0xFF at 2" in refused("generate", "-", stdin=b"ab\xff")
    done = subprocess.run(
        [*COMMAND, "tokens", b"ab\xff"], capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert b"lone surrogate" in done.stderr


def test_a_terminal_without_the_characters() -> None:
    code, out, _ = here("tokens", "é€", "--model", "gpt2", encoding="ascii")
    assert (code, out) == (0, " 2634  '\\xe9'\n26391  '\\u20ac'\n")


def test_streams_that_are_closed() -> None:
    for redirect, message in ((">&-", "standard output is closed"), ("<&-", "standard input is closed")):
        done = subprocess.run(
            ["sh", "-c", f'"$0" -m npgpt tokens - {redirect}', sys.executable], capture_output=True, cwd=ROOT
        )
        assert (done.returncode, done.stderr.decode()) == (2, f"npgpt: error: {message}\n")


def test_an_error_that_cannot_be_told_keeps_its_exit_code() -> None:
    done = subprocess.run(["sh", "-c", '"$0" -m npgpt generate a --n-head 5 2>/dev/full', sys.executable], cwd=ROOT)
    assert done.returncode == 2


def test_names_in_a_file_do_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    arrays = random_arrays(small(), dtype="float32") | {"\x1b[2J": np.zeros(1, np.float32)}
    safetensors.write(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps(configs.to_dict(small()) | {"\x1b[31m": 1}))
    assert "\\x1b[2J is unexpected" in refused("inspect", str(tmp_path))


def test_json_loses_no_character() -> None:
    _, out, _ = here("generate", "café — 日本", "--json", "--max-tokens", "1", encoding="ascii")
    assert json.loads(out)["prompt"] == "café — 日本"


def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "no checkpoint that npgpt reads; it holds model.safetensors" in refused("inspect", str(tmp_path))


def start(*arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert len(process.stdout.read(len(CARD_PROMPT) + 10)) == len(CARD_PROMPT) + 10  # the prompt and the first pieces
    return process


ENDLESS = ("generate", CARD_PROMPT, "--dtype", "float64", "--max-tokens", "244", "--ignore-eos", "--threads", "1")


def test_text_is_streamed_and_ctrl_c_ends_it_with_130() -> None:
    """The first read returns part of the text, so the output is flushed before the process ends."""
    for _ in range(5):  # the model may be done before the signal comes; then another try
        process = start(*ENDLESS)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert error == b""
        if process.returncode != 0:
            break
    assert process.returncode == 130


def test_ctrl_c_while_starting_is_quiet_too() -> None:
    """Ctrl-C arrives at many moments while modules are imported and the model loads."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    seen = set()
    for delay in np.linspace(0.02, 0.35, examples(4, 24)):
        pipe = subprocess.PIPE
        process = subprocess.Popen([*COMMAND, *ENDLESS], stdout=pipe, stderr=pipe, env=environment)
        time.sleep(float(delay))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        seen.add(process.returncode)
        assert b"npgpt/cli" not in error  # while Python itself starts, there is nobody yet to be quiet
    assert 130 in seen


def test_a_closed_pipe_is_quiet() -> None:
    process = start(*ENDLESS)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), error) == (141, b"")


def test_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def exhausted(*arguments: Any, **keywords: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(inspect, "inspect", exhausted)
    assert cli.main(["inspect"]) == 2
    assert capsys.readouterr().err == "npgpt: error: not enough memory for this model in this dtype\n"


def test_threads_are_set_before_numpy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """NumPy is already imported here, so --threads would have no effect and is an error."""
    assert "numpy" in sys.modules
    assert cli.main(["generate", "a", "--threads", "2"]) == 2
    assert "NumPy is already imported" in capsys.readouterr().err
    code = (
        "import os; from npgpt.cli.options import tune; tune(3); import numpy;"
        "print(os.environ['OPENBLAS_NUM_THREADS'], os.environ['OMP_NUM_THREADS'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert done.stdout == b"3 3\n"


@pytest.mark.parametrize(("users", "then"), [(None, "20"), ("26", "26")])
def test_idle_blas_threads_sleep_soon_unless_the_user_says_when(users: str | None, then: str) -> None:
    code = "import os; from npgpt.cli.options import tune; tune(); print(dict(os.environ))"
    known = {name: value for name, value in os.environ.items() if "THREAD" not in name}
    told = known if users is None else {**known, "OPENBLAS_THREAD_TIMEOUT": users}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=told)
    assert ast.literal_eval(done.stdout) == {**ast.literal_eval(done.stdout), **told, "OPENBLAS_THREAD_TIMEOUT": then}
    assert "OPENBLAS_NUM_THREADS" not in ast.literal_eval(done.stdout)


def test_inspect_as_json(tmp_path: Path) -> None:
    code, out, error = here("inspect", "--json")
    found = json.loads(out)
    assert (code, error, out.count("\n")) == (0, "", 1)
    assert (found["name"], found["parameters"], found["head_width"], found["config"]["n_head"]) == (
        "austen",
        3_505_152,
        32,
        6,
    )
    (file,) = found["files"]
    assert file["sha256"] == CARD_SHA256
    assert (file["bytes"], Path(file["path"]).name, found["path"]) == (7016832, "model.safetensors", file["path"])
    assert (found["non_finite"], found["dtypes"], sum(found["counts"].values())) == ({}, {"float16": 76}, 3_505_152)
    arrays = random_arrays(small(), dtype="float32")
    arrays["wpe.weight"][0, :3] = np.nan, np.inf, -np.inf
    safetensors.write(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps(configs.to_dict(small())))
    for terminal in (False, True):  # where lines are broken, but not JSON
        found = json.loads(here("inspect", str(tmp_path), "--json", terminal=terminal)[1])
        assert found["non_finite"] == {"wpe.weight": {"nan": 1, "infinite": 2}}


def test_greedy_samples_are_said_to_be_the_same() -> None:
    said = "npgpt: --temperature 0 is greedy: the 2 samples are the same text\n"
    arguments = ("generate", "It", "--max-tokens", "2", "--temperature", "0")
    code, out, error = here(*arguments, "--samples", "2")
    assert (code, error) == (0, said)
    assert out.split(" ---\n")[1].splitlines()[0] == out.split(" ---\n")[2].splitlines()[0]
    assert here(*arguments)[2] == here(*arguments, "--samples", "2", "--temperature", "1")[2] == ""
