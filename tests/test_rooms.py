"""The structure that CONTRIBUTING.md describes: which room may import which, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import npgpt

HOUSE = Path(npgpt.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))

# From the inside out: a room imports rooms of lines above its own, and nothing of its own line or below.
FLOORS = [
    {"errors"},
    {"config", "erf", "process"},
    {"parameters", "kernels", "cache"},
    {"model"},
    {"gradients"},
    {"checkpoints"},
    {"text"},
    {"language_model"},
    {"pictures", "tracing"},  # pictures has the page style of every HTML file
    {"oracle", "scoring"},
    {"testing"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FORWARD_PASS = {"model", "kernels", "cache"}
# (file, room) of what breaks the rule today; each entry has to be true, so that it goes when its reason has gone.
EXCEPTIONS = {
    ("checkpoints/download.py", "text"),
    ("checkpoints/inspect.py", "text"),
    ("checkpoints/write.py", "text"),
}
# imported inside functions, each in one room
EXTRAS = {
    "huggingface_hub": "checkpoints",
    "google_crc32c": "checkpoints",
    "gguf": "checkpoints",
    "tokenizers": "text",
    "argcomplete": "cli",
    "llm": "cli",
    "pydantic": "cli",
}


def room_of(path: Path) -> str:
    """Return a file's folder, or the file itself at the top level."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


@cache
def statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """Return a file's imports at run time, including those in functions, but not those for type checkers."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def rooms(path: Path) -> set[str]:
    """Return the other rooms of npgpt that a file imports."""
    folders = path.relative_to(HOUSE).parts[:-1]
    found = set()
    for node in statements(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folders[: len(folders) + 1 - node.level]
            parts = (*above, *(node.module or "").split(".")) if node.module else above
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found - {room_of(path), "__version__"}


def packages(path: Path) -> set[str]:
    """Return the third-party packages that a file imports."""
    found = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif not node.level:
            found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_point_from_the_outside_in(path: Path) -> None:
    if path == HOUSE / "__init__.py":  # imports a name when it is first used
        assert rooms(path) == set()
        return
    outward = {room for room in rooms(path) if FLOOR[room] >= FLOOR[room_of(path)]}
    file = path.relative_to(HOUSE).as_posix()
    assert outward == {room for name, room in EXCEPTIONS if name == file}


def test_the_forward_pass_knows_no_file_no_text_and_no_command_line() -> None:
    assert rooms(HOUSE / "model.py") == {"erf", "kernels", "parameters"}
    assert packages(HOUSE / "model.py") == {"numpy"}
    assert rooms(HOUSE / "kernels.py") == {"process"}


def test_the_forward_pass_stays_short() -> None:
    assert (
        len((HOUSE / "model.py").read_text("utf-8").splitlines()) <= 177
    )  # four of them for padding, three for threads


def test_checkpoints_know_no_forward_pass() -> None:
    for path in (HOUSE / "checkpoints").rglob("*.py"):
        assert rooms(path) & FORWARD_PASS == set(), path


def test_nobody_imports_the_command_line() -> None:
    for path in FILES:
        assert "cli" not in rooms(path) or room_of(path) == "__main__", path


def test_what_lies_at_the_top_is_few_and_hides_no_public_function() -> None:
    assert len(list(HOUSE.glob("*.py"))) <= 12 + len({"__init__.py", "__main__.py"})
    assert {path.stem for path in HOUSE.iterdir()} & {"generate", *npgpt.__all__} == set()


def test_every_room_has_a_floor() -> None:
    there = {room_of(path) for path in FILES} - {"__init__"}
    assert there == set(FLOOR)


def test_only_numpy_and_tiktoken_at_run_time() -> None:
    for path in FILES:
        here = {package for package, room in EXTRAS.items() if room == room_of(path)}
        assert packages(path) - {"numpy", "tiktoken"} <= here, path


def test_extras_are_imported_when_they_are_used() -> None:
    modules = [".".join(path.relative_to(HOUSE.parent).with_suffix("").parts) for path in FILES]
    modules = [name.removesuffix(".__init__") for name in modules if not name.endswith((".__main__", ".llm_plugin"))]
    code = f"import sys, {', '.join(modules)}; assert not {set(EXTRAS)} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_npgpt_and_its_help_does_not_import_numpy() -> None:
    code = "import sys, npgpt, npgpt.cli; assert 'numpy' not in sys.modules; npgpt.load; assert 'numpy' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in npgpt.__all__:
        assert getattr(npgpt, name).__doc__ or name == "PUBLISHED"


def test_the_textbook_is_a_second_derivation() -> None:
    """It uses nothing of the forward pass that it verifies."""
    assert rooms(HOUSE / "oracle" / "textbook.py") & FORWARD_PASS == set()


def test_the_names_of_models_are_known_without_numpy() -> None:
    code = "from npgpt.checkpoints.places import names; assert 'austen' in names()"
    subprocess.run([sys.executable, "-c", f"{code}; import sys; assert 'numpy' not in sys.modules"], check=True)
