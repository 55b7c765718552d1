"""npgpt download without the extra hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from npgpt.checkpoints import download
from npgpt.errors import NpgptError
from tests.support.command import here

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> tuple[int, str, str]:
    """Run the command line in a process that cannot import huggingface_hub."""
    with mock.patch.dict(sys.modules, {"huggingface_hub": None}):
        return here(*arguments)


@pytest.mark.parametrize("name", ["gpt2", "org/name"])
def test_without_the_extra_it_says_how_to_install_it(name: str) -> None:
    message = "npgpt: error: npgpt download needs the extra hub: pip install huggingface_hub\n"
    assert run("download", name) == (2, "", message)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "nobody",
            "../x",
            "a/b/c",
            "/gpt2",
            "gpt2/",
            "org/",
            "a b/c",
            "org/na me",
            "org/-x",
            "org/x-",
            ".org/x",
        ),
        *("org/a--b", "org/a..b", "org/x.git", "org/ü", "https://huggingface.co/gpt2", "org/name\n", "org/" + "x" * 97),
    ],
)
def test_a_name_that_can_be_none(name: str) -> None:
    with pytest.raises(NpgptError, match=r"cannot be downloaded: give one of gpt2, .*, distilgpt2, or org/name$"):
        download.repository_name(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["../x"], "'../x' cannot be downloaded"),
        (["austen"], "austen comes with npgpt and needs no download"),
        (["gpt2", "--revision", "../main"], "the revision must be a branch, a tag or a commit, not '../main'"),
    ],
)
def test_what_can_be_no_model_is_refused_before_all_else(arguments: list[str], message: str) -> None:
    code, out, error = run("download", *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert message in error


@pytest.mark.parametrize("revision", ["", "../main", "a b", "refs/../x", "/main", "main\n"])
def test_a_revision_that_can_be_none(revision: str) -> None:
    with pytest.raises(NpgptError, match="the revision must be a branch, a tag or a commit, not "):
        download.fetch("gpt2", revision)


def test_help_has_an_example_and_fits_a_screen() -> None:
    code, out, _ = run("download", "--help")
    assert code == 0
    assert "example: npgpt download gpt2" in out
    assert len(out.splitlines()) <= 50


def test_the_help_imports_neither_numpy_nor_the_hub() -> None:
    code = (
        "import sys, npgpt.cli\n"
        "try: npgpt.cli.main(['download', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_an_adapter_is_fetched_with_its_settings() -> None:
    files = ["README.md", "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "training_args.bin"]
    assert download.choose(files, "org/x") == ["adapter_config.json", "adapter_model.safetensors"]
