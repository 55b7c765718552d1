"""Who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import npgpt

ROOMS = Path(npgpt.__file__).parent


def imports(path: Path) -> set[str]:
    """The modules a file imports at run time, its own package's with a leading dot."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= (
                {"." + (node.module or alias.name).split(".")[0] for alias in node.names}
                if node.level
                else {(node.module or "").split(".")[0]}
            )
    return found - {"__future__"}


def test_the_forward_pass_needs_numpy_erf_and_the_kernels_alone() -> None:
    assert imports(ROOMS / "model.py") == {"math", "typing", "numpy", ".erf", ".kernels"}
    assert imports(ROOMS / "kernels.py") - set(sys.stdlib_module_names) == {"numpy", ".process"}


def test_the_forward_pass_stays_short() -> None:
    assert len((ROOMS / "model.py").read_text("utf-8").splitlines()) <= 170


def test_nobody_imports_the_command_line_and_checkpoints_know_no_forward_pass() -> None:
    for path in ROOMS.rglob("*.py"):
        room = path.relative_to(ROOMS).parts[0]
        if room not in ("cli", "__main__.py"):
            assert ".cli" not in imports(path), path
        if room == "checkpoints":
            assert not imports(path) & {".model", ".generation", ".sampling", ".tokenizer", ".loading"}, path


def test_only_numpy_and_tiktoken_at_run_time() -> None:
    standard = set(sys.stdlib_module_names)
    extras = {"checkpoints/download.py": {"huggingface_hub"}, "checkpoints/crc32c.py": {"google_crc32c"}}
    for path in ROOMS.rglob("*.py"):
        foreign = {name for name in imports(path) if not name.startswith(".")} - standard - {"numpy", "tiktoken"}
        assert foreign == extras.get(path.relative_to(ROOMS).as_posix(), set()), path


def test_extras_are_imported_when_they_are_used() -> None:
    code = "import sys, npgpt.checkpoints.download, npgpt.cli.download; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_npgpt_and_its_help_does_not_import_numpy() -> None:
    code = "import sys, npgpt, npgpt.cli; assert 'numpy' not in sys.modules; npgpt.load; assert 'numpy' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in npgpt.__all__:
        assert getattr(npgpt, name).__doc__ or name == "PUBLISHED"


def test_the_textbook_is_a_second_derivation() -> None:
    """It takes nothing from the forward pass that it keeps honest, and nothing but the command line leans on it."""
    assert imports(ROOMS / "oracle" / "textbook.py") & {".model", ".kernels", ".cache"} == set()
    for path in ROOMS.rglob("*.py"):
        if path.relative_to(ROOMS).parts[0] not in ("oracle", "cli", "testing.py"):
            assert ".oracle" not in imports(path), path
