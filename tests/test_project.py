"""What the project says of itself in more than one file."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

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
    """A folder that setup.cfg does not list is missing in the wheel."""
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
