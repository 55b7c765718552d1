"""Facts that several of the project's files state must agree."""

from __future__ import annotations

import argparse
import ast
import configparser
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from npgpt.checkpoints import formats, names
from npgpt.errors import NpgptError
from npgpt.oracle import block_mistakes, mistakes
from tests import conftest

ROOT = Path(__file__).parent.parent


def settings() -> configparser.ConfigParser:
    """Return setup.cfg."""
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg", "utf-8")
    return found


def test_tools_have_one_version_everywhere() -> None:
    pinned = re.findall(r"^(\S+)==(\S+)$", settings()["options.extras_require"]["dev"], re.MULTILINE)
    assert [name for name, _ in pinned] == ["ruff", "mypy", "nox"]
    hooks = re.findall(r'"(ruff|mypy)==([^"]+)"', (ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert set(hooks) == set(pinned[:2])


def test_every_python_that_is_promised_is_tested() -> None:
    promised = re.findall(r":: (3\.\d+)$", settings()["metadata"]["classifiers"], re.MULTILINE)
    tree = ast.parse((ROOT / "noxfile.py").read_text("utf-8"))
    (tested,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PYTHONS"
    )
    assert promised == tested[: len(promised)]  # a newer one may be tried before it is promised
    assert settings()["options"]["python_requires"] == f">={promised[0]}"


def test_every_package_is_listed() -> None:
    """A folder that setup.cfg does not list is missing from the wheel."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "npgpt").rglob("*.py")}
    listed = settings()["options"]["packages"].split()
    assert sorted(listed) == sorted([".".join(folder.parts) for folder in folders] + ["npgpt.weights"])


def test_no_test_imports_from_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or ""
                names = [f"{module}.{alias.name}" for alias in node.names]
                assert not [name for name in names if re.search(r"(^|\.)tests\..*\btest_", name)], (path, names)


def test_folders_that_are_deselected_are_not_imported() -> None:
    """Their packages take seconds to import, in each run of the plain tests."""
    given = re.search(r'-m "(.*?)"', settings()["tool:pytest"]["addopts"])
    assert given is not None
    for expression, expected in ((given[1], ["parity", "browser"]), ("parity", []), ("", [])):
        config: Any = SimpleNamespace(option=SimpleNamespace(markexpr=expression))
        folders = ("parity", "browser", "oracle", "tests")
        assert [name for name in folders if conftest.pytest_ignore_collect(Path(name), config)] == expected


def examples() -> list[str]:
    """Return the Python blocks of CONTRIBUTING.md: a format, a scheme, a mistake, a verb."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)


def test_the_format_that_is_an_example_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat: dict[str, Any] = {"__package__": "npgpt.checkpoints"}
    exec(examples()[0], flat)
    monkeypatch.setattr(formats, "READERS", (*formats.READERS, (flat["recognises"], flat["read"])))
    (tmp_path / "m").write_bytes(b"FLAT" + np.arange(6, dtype="<f4").tobytes())
    assert formats.read(tmp_path / "m").tensors["wte.weight"].load().tolist() == [[0, 1], [2, 3], [4, 5]]
    (tmp_path / "m").write_bytes(b"FLAT" + bytes(7))
    with pytest.raises(NpgptError, match="truncated"):
        formats.read(tmp_path / "m")


def test_the_scheme_that_is_an_example_translates() -> None:
    scheme = eval(examples()[1], vars(names))
    tensors = {name: SimpleNamespace(shape=(2, 2)) for name in ("decoder.3.attention.out.kernel", "embed.kernel")}
    assert scheme.translate(tensors).keys() == {"h.3.attn.c_proj.weight", "wte.weight"}


def test_the_mistake_that_is_an_example_is_an_entry() -> None:
    scope = dict(vars(block_mistakes))
    exec(examples()[2], scope)
    (entry,) = mistakes.entries(scope["ACTIVATIONS"])
    assert (entry.name, entry.source, entry.stages) == ("leaky ReLU", "vision models", ("mlp.act",))


def test_the_verb_that_is_an_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    ids: dict[str, Any] = {"__package__": "npgpt.cli"}
    exec(examples()[3], ids)
    parser = argparse.ArgumentParser()
    ids["declare"](parser)
    assert ids["run"](parser.parse_args([])) == 0
    assert capsys.readouterr().out == "4096\n"
