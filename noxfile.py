"""The checks of this project, each in a virtual environment of its own: `nox -l` lists them, `nox -s lint` runs one.

`nox` alone runs those that take seconds or a minute. `.ci/run` runs all of them from a clean checkout.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.3"
nox.options.default_venv_backend = "uv|venv"
nox.options.error_on_missing_interpreters = False  # a Python that is not installed is skipped, and said so
nox.options.sessions = ["lint", "types", "tests"]

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
# without their dependencies: the first declares TensorFlow and Jupyter, of the second its windows alone are compared
ALONE = ("llms-from-scratch==1.0.19", "lm_eval==0.4.13")
PARALLEL = ("-n", "auto")  # pytest-xdist: as many processes as cores, each with one thread of BLAS
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
MICROFORMER = "microformer-mgm==0.5.8"  # a GPT-2 that others trained, as torch.save wrote it; unpacked, never installed
# of the extra bench, those that need no compiler
ENGINES = ("matplotlib", "threadpoolctl", "onnx", "onnxruntime", "ctranslate2", "openvino-genai")
BEGINNING = "It is a truth universally acknowledged"
GREEDY = f"{BEGINNING}, and I am sure I should not have been able to see you again"


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format with ruff."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy, with the packages of every extra that has types."""
    session.install("-e", ".[test,parity,hub,cluster,crc32c,completion,dev]")
    session.install("--no-deps", *ALONE)
    session.run("mypy")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the plain tests on every Python that is installed."""
    session.install("-e", ".[test,completion]", "pytest-xdist==3.8.0")
    session.run("pytest", "-q", *PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the tests with the oldest NumPy and tiktoken that are allowed, and with all the examples."""
    session.install("-e", ".[test,crc32c,completion]", "pytest-xdist==3.8.0", "numpy==2.0.2", "tiktoken==0.13.0")
    session.run("pytest", "-q", "--hypothesis-profile=thorough", *PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session
def parity(session: nox.Session) -> None:
    """Compare with the real packages."""
    session.install("-e", ".[test,parity,hub,cluster]", "pytest-xdist==3.8.0", "pip")
    session.install("--no-deps", *ALONE)
    packages = (
        "torch, transformers, llms_from_scratch.ch04, gguf, huggingface_hub, lm_eval.utils, distributed, peft, llm"
    )
    session.run("python", "-c", f"import {packages}")  # or their tests are skipped
    wheels = Path(session.create_tmp()) / "wheels"
    session.run("python", "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), MICROFORMER)
    (wheel,) = wheels.glob("microformer_mgm-*.whl")
    environment = {"NPGPT_MICROFORMER_WHEEL": str(wheel), "HF_HUB_OFFLINE": "1", **ONE_THREAD}
    found, kept = Path(session.create_tmp()) / "verification.md", Path("docs/verification.md")
    session.run("pytest", "-q", "-m", "parity", f"--verification={found}", *PARALLEL, *session.posargs, env=environment)
    if session.posargs:  # some of the tests
        return
    rows = [re.findall(r"^(#.*|\| [^|]*)", path.read_text("utf-8"), re.MULTILINE) for path in (found, kept)]
    if rows[0] != rows[1]:
        session.error(f"{kept} has other comparisons than this run, which wrote {found}: copy it")


@nox.session
def browser(session: nox.Session) -> None:
    """Open the pages in a real browser, which has to be installed (Debian: apt-get install chromium)."""
    session.install("-e", ".[test]")
    output = str(session.run("pytest", "-q", "-m", "browser", "tests/browser", silent=True))
    print(output)
    if "skipped" in output:
        session.error("the page was not opened in a browser")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Run the benchmarks at toy size: every engine runs, and gives the same ids."""
    session.install("-e", ".[test,parity]", *ENGINES)
    out = Path(session.create_tmp()) / "toy"
    shutil.rmtree(out, ignore_errors=True)
    toy = ("python", "-m", "benchmarks", "--model", "toy", "--rounds", "1", "--cache", str(out / "cache"))
    session.run(*toy, "--threads", "2", "--out", str(out / "RESULTS.md"))
    session.run(*toy, "--engine", "npgpt", "--workload", "prefill 4", "--out", str(out / "one.md"))
    lines = (out / "RESULTS.md").read_text("utf-8").splitlines()
    for engine in ("transformers sdpa", "onnxruntime", "OpenVINO GenAI", "CTranslate2"):
        if not any(re.match(rf"\| {engine} \| .*[0-9] s ", line) for line in lines):
            session.error(f"{engine} did not run")
    if wrong := [line for line in lines if line.startswith("- not counted")]:
        session.error(f"ids differ: {wrong}")
    for chart, workloads in (("RESULTS", 4), ("one", 1)):  # a frame for each workload, none empty
        frames = (out / f"{chart}.svg").read_text("utf-8").count('id="axes_')
        if frames != workloads:
            session.error(f"{chart}.svg has {frames} frames, not {workloads}")
    session.run("python", "-m", "benchmarks.conversion", "--model", "distilgpt2")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel through the source distribution, and use it in another folder."""
    session.install("build")
    temporary = Path(session.create_tmp()).resolve()
    for name in ("tree", "dist", "clean", "elsewhere"):
        shutil.rmtree(temporary / name, ignore_errors=True)
    tree, dist, elsewhere = temporary / "tree", temporary / "dist", temporary / "elsewhere"
    listed = session.run("git", "ls-files", "-co", "--exclude-standard", external=True, silent=True)
    for name in filter(Path.exists, map(Path, str(listed).splitlines())):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, tree / name)
    (tree / "weights" / "gpt2").mkdir()
    shutil.copy2("weights/austen/model.safetensors", tree / "weights" / "gpt2")  # a converted model must stay here
    session.run("python", "-m", "build", "-o", str(dist), str(tree), silent=True)
    (built,) = dist.glob("npgpt-*.whl")
    names = str(session.run("python", "-m", "zipfile", "-l", str(built), silent=True))
    for name in ("weights/gpt2/", "tests/", "benchmarks/"):
        if name in names:
            session.error(f"the wheel holds {name}")

    session.run("python", "-m", "venv", str(temporary / "clean"))
    python, npgpt = temporary / "clean" / "bin" / "python", temporary / "clean" / "bin" / "npgpt"

    def run(command: Path, *arguments: str) -> str:
        """Return what a command of the clean environment prints."""
        output = str(session.run(str(command), *arguments, external=True, silent=True))
        print(output)
        return output

    run(python, "-m", "pip", "install", "-q", str(built))
    elsewhere.mkdir()
    with session.chdir(elsewhere):
        text = run(npgpt, "generate", BEGINNING, "--temperature", "0", "--max-tokens", "40")
        if not text.startswith(GREEDY):
            session.error(f"npgpt generate gives another text than {GREEDY!r}")
        Path("text").write_text(text, "utf-8")
        run(npgpt, "tokens", "--model", "gpt2", "Hello, world")
        run(npgpt, "inspect")
        run(npgpt, "attend", "It is a truth", "--html", "attention.html")
        run(npgpt, "trace", "It is a truth", "-o", "trace.npz")
        if "\nMatches" not in "\n" + run(npgpt, "check", "trace.npz"):
            session.error("npgpt check finds a difference in npgpt's own trace")
        run(npgpt, "score", "text", "--workers", "2", "--html", "score.html")
        run(python, "-m", "pip", "list")
    with session.chdir(tree):  # a bare checkout, not installed
        if f"{tree}/weights/austen/model.safetensors" not in run(python, "-m", "npgpt", "inspect"):
            session.error("a bare checkout does not use its own weights")
