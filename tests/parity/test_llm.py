"""The plugin for the command llm, run by the real command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.austen import AUSTEN
from tests.support.command import here
from tests.support.models import small, store

pytestmark = pytest.mark.parity
llm = pytest.importorskip("llm", reason="extra parity is not installed")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a private folder for llm's logs and the weights of a model without a vocabulary."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("NPGPT_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    store(tmp_path / "weights" / "bare", small())
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    """Return the exit code and the output of the command llm."""
    from click.testing import CliRunner
    from llm.cli import cli

    found = CliRunner().invoke(cli, list(arguments))
    return found.exit_code, found.output


def continued(text: str, tokens: int) -> str:
    return "".join(AUSTEN.generate(text, max_tokens=tokens, temperature=0))


@pytest.mark.usefixtures("home")
def test_models_are_those_of_npgpt_list() -> None:
    code, output = run("models", "list", "--options")
    assert code == 0
    assert [line for line in output.splitlines() if line.startswith("Npgpt: ")] == [
        "Npgpt: npgpt-austen",
        "Npgpt: npgpt-bare",
    ]
    assert "repetition_penalty" in output


@pytest.mark.usefixtures("home")
def test_a_text_is_continued_and_so_is_the_conversation() -> None:
    options = ("-o", "temperature", "0", "-o", "max_tokens")
    assert run("-m", "npgpt-austen", "It is a truth", *options, "8") == (0, continued("It is a truth", 8) + "\n")
    before = f"It is a truth{continued('It is a truth', 8)} Emma"
    assert run("-c", " Emma", *options, "9") == (0, continued(before, 9) + "\n")
    logs = json.loads(run("logs", "--json", "-n", "1")[1])
    assert logs[0]["response"] == continued(before, 9)


@pytest.mark.usefixtures("home")
def test_options_are_mapped() -> None:
    settings: dict[str, Any] = {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "seed": 5,
    }
    expected = "".join(AUSTEN.generate("It is", max_tokens=12, stop="Mr", **settings))
    given = [text for name, value in settings.items() for text in ("-o", name, str(value))]
    code, output = run("-m", "npgpt-austen", "It is", *given, "-o", "max_tokens", "12", "-o", "stop", "Mr")
    assert (code, output) == (0, expected + "\n")


@pytest.mark.usefixtures("home")
def test_without_options_the_text_is_that_of_npgpt_generate() -> None:
    code, output, _ = here("generate", "It is a truth", "--seed", "1")
    assert (code, output) == (0, f"It is a truth{run('-m', 'npgpt-austen', 'It is a truth', '-o', 'seed', '1')[1]}")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "npgpt-austen", "hi", "-s", "Be brief."], "npgpt-austen continues a text and has no system prompt"),
        (["-m", "npgpt-austen", "hi", "-o", "temperature", "-1"], "temperature must be 0"),
        (["-m", "npgpt-austen", "hi", "-o", "temprature", "1"], "temprature"),
        (["-m", "npgpt-austen", "word " * 300], "do not fit into the context of 256"),
        (["-m", "npgpt-bare", "hi"], "bare has no text"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert (code, output.startswith("Error: "), message in output) == (1, True, True)
    assert "Traceback" not in output
