"""Runs the blocks of README.md and docs/ in a folder of their own, and compares what they print with what is shown.

A block of `sh` holds npgpt's commands, also after `echo TEXT |` or `printf TEXT |`. A block of `python` uses the names
of the document's earlier ones. A block of `text` that follows holds the output, in which `…` stands for anything.

    python -m tests.support.documents

replaces output that has changed, and README.md's copy of `block`. Look at what it did to output with `…` in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest import mock

from npgpt.checkpoints import configs
from npgpt.config import PUBLISHED, Config

from .command import here
from .models import random_arrays, small, store
from .namings import llms_from_scratch, nanogpt
from .places import VARIABLES
from .writers import torch_zip

ROOT = Path(__file__).parents[2]
RUN = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.name != "reading.md"]
OTHERS = ("CONTRIBUTING.md", "weights/README.md", "benchmarks/README.md", "docs/reading.md")
LINKED = [*RUN, *filter(Path.exists, map(ROOT.joinpath, OTHERS)), *sorted((ROOT / "examples").glob("**/README.md"))]
WIDEST = 100  # columns of output; longer lines are broken between words
# the figures of a check are rounding errors, which differ from one BLAS to the next
FIGURE = re.compile(r"\d[\d,.]*(e[+-]\d+)?")

# blocks that are not run here, by how they begin
PIP = "installs packages: .ci/run runs it"
SHELL = "a shell's start-up file: tests/test_completion.py runs the shells"
PARITY = "needs the extra parity: tests/parity/test_documents.py runs it"
ELSEWHERE = {
    "def block(": "the model's source: test_the_block_is_the_models",
    "python3 -m venv ../npgpt-run": PIP,
    "python3 -m venv ../npgpt-test": PIP,
    'eval "$(register-python-argcomplete': SHELL,
    "autoload -Uz compinit": SHELL,
    "register-python-argcomplete": SHELL,
    "llm install": "needs the command llm: tests/parity/test_llm.py runs it",
    '{"format": "npgpt raw"': "a file's content: tests/test_raw.py reads such files",
    "npgpt download gpt2": "fetches from the hub: tests/test_download.py has a server of its own",
    "npgpt.check(model": PARITY,
    "print(npgpt.check(model": PARITY,
    "print(npgpt.check(theirs": PARITY,
    'npgpt trace "It is a truth" --loss --gradients -o step.npz': PARITY,
    "from distributed import Client": PARITY,
}


@dataclass(frozen=True)
class Block:
    """A fenced block; shown is the block of text that follows it, if one does."""

    document: Path
    language: str
    text: str
    shown: str | None

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}: {self.text.splitlines()[0]}"

    @property
    def elsewhere(self) -> str:
        """The reason in ELSEWHERE why the block is not run here, or nothing."""
        return next((reason for beginning, reason in ELSEWHERE.items() if self.text.startswith(beginning)), "")

    @property
    def needs_parity(self) -> bool:
        """Whether tests/parity/test_documents.py runs the block."""
        return self.elsewhere == PARITY

    def agrees(self, printed: str) -> bool:
        """Return whether what was printed is what is shown, or at least not an error where nothing is shown."""
        if self.shown is None:
            return not printed.startswith("npgpt: error")
        return matches(self.shown, printed, exactly="check" not in self.text)


def blocks(document: Path) -> Iterator[Block]:
    """Yield the blocks of a document that are not output."""
    fenced = r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?"
    for found in re.finditer(fenced, document.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        if found[1] != "text":
            yield Block(document, found[1], found[2], found[3])


def anchors(document: Path) -> set[str]:
    """Return the names of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: Path) -> list[str]:
    """Return where a document's links and pictures lead, except for those into the web."""
    found = re.findall(r"\]\(([^)]+)\)", document.read_text("utf-8"))
    return [link for link in found if not link.startswith("https://")]


def lay_out(folder: Path) -> None:
    """Write the files that documents take for granted: gpt2, small but with GPT-2's ids, foreign checkpoints, texts."""
    for name in ("weights", "out", "letters"):
        (folder / name).mkdir()
    config = Config(vocab_size=50257, n_positions=1024, n_embd=24, n_layer=2, n_head=12)
    store(folder / "weights" / "gpt2", config)
    store(folder / "weights" / "my-xl", small())
    stated = configs.to_dict(PUBLISHED["gpt2-xl"]) | {"n_head": 48}
    (folder / "weights" / "my-xl" / "config.json").write_text(json.dumps(stated))
    arrays = random_arrays(config, dtype="float32")
    stated = {"n_layer": 2, "n_head": 12, "n_embd": 24, "block_size": 1024, "bias": True, "vocab_size": 50257}
    (folder / "out" / "ckpt.pt").write_bytes(
        torch_zip(nanogpt(arrays), wrap=lambda state: {"model": state, "model_args": stated})
    )
    (folder / "model.pth").write_bytes(torch_zip(llms_from_scratch(arrays)))
    for number in (1, 2):
        (folder / "letters" / f"{number}.txt").write_text("It is a truth universally acknowledged.\n" * number)


def command(line: str, folder: Path) -> str:
    """Return what a line of `sh` prints, or its error."""
    first, pipe, second = line.partition(" | ")
    program, *given = shlex.split(first) if pipe else [""]
    stdin = " ".join(given) + "\n" * (program == "echo")
    words = shlex.split(second if pipe else first, comments=True)
    assert words[0] == "npgpt", line
    files = [sorted(str(path.relative_to(folder)) for path in folder.glob(word)) for word in words[1:]]
    words = [
        each
        for word, paths in zip(words[1:], files, strict=True)
        for each in (paths if "*" in word and paths else [word])
    ]
    code, out, error = here(*words, cwd=folder, stdin=stdin.encode(), COLUMNS=str(WIDEST), NPGPT_WEIGHTS="weights")
    assert "Traceback" not in error
    return error if code == 2 else out


def run(block: Block, folder: Path, names: dict[str, Any]) -> str:
    """Return what a block prints. Python runs in `names`, and adds to them."""
    assert block.language in ("sh", "python"), f"{block} is in neither language, nor in ELSEWHERE"
    if block.language == "sh":
        lines = block.text.replace("\\\n", "").splitlines()
        return "".join(command(line, folder) for line in lines if line.partition("#")[0].strip())
    before, printed = Path.cwd(), io.StringIO()
    places = dict.fromkeys(VARIABLES, str(folder / "nowhere")) | {"NPGPT_WEIGHTS": str(folder / "weights")}
    with contextlib.redirect_stdout(printed), mock.patch.dict(os.environ, places):
        os.chdir(folder)
        try:
            exec(block.text, names)
        finally:
            os.chdir(before)
    return printed.getvalue()


def matches(shown: str, printed: str, exactly: bool = True) -> bool:
    """Return whether a document shows what was printed: … is anything, and long lines may be broken between words.

    Without `exactly`, numbers may be others and columns of another width.
    """
    shown, printed = (text.rstrip() for text in (shown, printed))
    if not exactly or max(map(len, [*printed.splitlines(), ""])) > WIDEST:
        shown, printed = (" ".join(text.split()) for text in (shown, printed))
    if not exactly:
        shown, printed = (FIGURE.sub("0", text) for text in (shown, printed))
    return re.fullmatch(".*".join(map(re.escape, shown.split("…"))), printed, re.DOTALL) is not None


def faults(document: Path, folder: Path) -> Iterator[tuple[Block, str]]:
    """Run a document's blocks in order, and yield those that print something else than is shown, with that."""
    lay_out(folder)
    names: dict[str, Any] = {}
    for block in blocks(document):
        if not block.elsewhere:
            printed = run(block, folder, names)
            if not block.agrees(printed):
                yield block, printed


def source() -> str:
    """Return the function `block` of model.py."""
    code = (ROOT / "npgpt" / "model.py").read_text("utf-8")
    return code[code.index("def block(") :].partition("\n\n\n")[0] + "\n"


def renewed(shown: str, printed: str) -> str:
    """Return what was printed, of which a text with … shows the lines most like its own."""
    lines = [
        part for line in printed.splitlines() for part in (textwrap.wrap(line, WIDEST) if line[WIDEST:] else [line])
    ]
    if "…" in shown:
        kept = [line if "…" in line else get_close_matches(line, lines, 1, 0.5) for line in shown.splitlines()]
        lines = [line if isinstance(line, str) else "".join(line) for line in kept]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace the output that has changed in every document."""
    (copied,) = (block.text for block in blocks(ROOT / "README.md") if block.text.startswith("def block("))
    (ROOT / "README.md").write_text((ROOT / "README.md").read_text("utf-8").replace(copied, source()), "utf-8")
    for document in RUN:
        with tempfile.TemporaryDirectory() as folder:
            found = list(faults(document, Path(folder)))
        for block, printed in found:
            print(block, "", printed, sep="\n")
            if block.shown is not None:
                output = block.text + "```\n\n```text\n"
                after = output + renewed(block.shown, printed)
                text = document.read_text("utf-8").replace(output + block.shown, after)
                document.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
