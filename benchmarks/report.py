"""Turn the samples of a run into tables and a chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import machine
from .peers import INT8
from .workloads import Plan, Workload, plan

OURS, BEFORE = "npgpt", "npgpt before"
TIE = 0.05
MB = 1e6
Samples = dict[int, float]  # seconds by round


def markdown(results: list[dict[str, Any]], chart_name: str) -> str:
    """Return the whole report."""
    lines = ["# Results", "", *heading(results[0]), "", f"![Bars of the same figures]({chart_name})", ""]
    for result in results:
        lines += [*model(result), ""]
    if len(results) > 1:
        lines += ["## Growth with the model's size", "", *growth(results)]
    if found := list(targets(results)):
        lines += ["## Aims", "", row("aim", "measured", ""), row("---", "---", "---"), *found]
    return "\n".join(lines).rstrip() + "\n"


def circumstances(result: dict[str, Any]) -> Iterator[str]:
    """Yield the command of a run, the machine and the versions."""
    where = result["environment"]
    yield f"`{result['command']}`, {result['day']}, {result['threads']} threads, {result['rounds']} rounds."
    yield ""
    yield f"- {where['processor']}, {where['cores']} cores, {where['system']}, Python {where['python']}"
    yield f"- NumPy's BLAS: {where['blas']}"
    yield f"- {where['packages']}"
    yield ""


def heading(result: dict[str, Any]) -> Iterator[str]:
    """Yield the report's heading: machine, versions, settings."""
    yield from circumstances(result)
    yield (
        "Random weights of the true shape, float32 unless said otherwise. Every engine runs in a fresh process of its "
        "own in every round, in turn; figures are medians over the rounds, of medians within a process after one call "
        "that does not count. A time counts only where the greedy ids are those of npgpt in float64 (and "
        "log-probabilities within 1e-3 of its), int8 excepted. Ratios are taken round by round: above 1 npgpt is "
        "faster, in brackets the lowest and the highest; within 5 % is a tie."
    )


def model(result: dict[str, Any]) -> Iterator[str]:
    """Yield all tables for one model's shape."""
    planned = plan(result["model"])
    yield f"## {result['model']}"
    yield ""
    rates = {key: sorted(line[key] / 1e9 for line in result["ceilings"]) for key in ("sgemm", "bandwidth")}
    sgemm, bandwidth = (f"{statistics.median(r):.1f} ({r[0]:.1f}–{r[-1]:.1f})" for r in rates.values())
    yield (
        f"The machine in the same run: sgemm {sgemm} GFLOP/s, read bandwidth {bandwidth} GB/s. Its limit in the tables "
        "is computed from the medians, and a round in which the machine is faster can exceed it."
    )
    yield ""
    for engine, reason in result["skipped"].items():
        yield f"- not run, or not to the end: {engine}: {reason}"
    wrong = {(line["engine"], line["workload"]) for line in result["measures"] if not line["agrees"]}
    for engine, workload in sorted(wrong):
        yield f"- not counted, since its ids are others: {engine}, {workload}"
    yield ""
    single = [workload for workload in planned.workloads if not workload.name.startswith("batch")]
    batches = [workload for workload in planned.workloads if workload.name.startswith("batch")]
    for title, workloads in (("One sequence", single), ("Several sequences decoded side by side", batches)):
        if any(samples(result, OURS, workload.name) for workload in workloads):
            yield f"### {title}"
            yield ""
            yield from table(result, workloads)
            yield ""
            yield from ratios(result, workloads)
            yield ""
    yield from starts(result)
    yield from memory(result, planned)


def growth(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of the workloads that all shapes share, a column for each shape."""
    models = [result["model"] for result in results]
    shared = [w for w in plan(models[0]).workloads if all(samples(result, OURS, w.name) for result in results)]
    for workload in shared:
        yield row(workload.name, *models)
        yield row(*["---"] * (len(models) + 1))
        for engine in dict.fromkeys(engine for result in results for engine in engines(result)):
            found = [samples(result, engine, workload.name) for result in results]
            yield row(engine, *(figure(workload, statistics.median(s.values())) if s else "–" for s in found))
        yield ""


def samples(result: dict[str, Any], engine: str, workload: str) -> Samples:
    """Return the valid seconds by round; empty for a workload that was not run."""
    return {
        line["round"]: line["seconds"]
        for line in result["measures"]
        if (line["engine"], line["workload"]) == (engine, workload) and line["agrees"]
    }


def engines(result: dict[str, Any]) -> list[str]:
    """Return the engines that ran, in order."""
    return list(dict.fromkeys(line["engine"] for line in result["measures"]))


def ceilings(result: dict[str, Any]) -> tuple[float, float]:
    """Return the medians of sgemm's operations and of bytes read, both a second."""
    lines = result["ceilings"]
    return statistics.median(line["sgemm"] for line in lines), statistics.median(line["bandwidth"] for line in lines)


def figure(workload: Workload, seconds: float) -> str:
    """Return a cell's figure: seconds for a prefill, tokens a second otherwise."""
    if workload.kind == "prefill":
        return f"{seconds:.3f} s"
    tokens = workload.batch if workload.kind == "decode" else workload.length - 1
    return f"{tokens / seconds:,.{0 if tokens / seconds > 200 else 1}f}"


def table(result: dict[str, Any], workloads: list[Workload]) -> Iterator[str]:
    """Yield a table of medians with a row for each engine."""
    heads = [workload.name + ("" if workload.kind == "prefill" else ", tokens/s") for workload in workloads]
    yield row("engine", *heads)
    yield row(*["---"] * (len(heads) + 1))
    for engine in engines(result):
        found = [samples(result, engine, workload.name) for workload in workloads]
        figures = [
            figure(w, statistics.median(s.values())) if s else "–" for w, s in zip(workloads, found, strict=True)
        ]
        yield row(engine, *figures)
    yield row(*["the machine's limit", *(limit(result, workload) for workload in workloads)])


def limit(result: dict[str, Any], workload: Workload) -> str:
    """Return the limit that sgemm and memory bandwidth set, from the run's medians."""
    config = plan(result["model"]).config
    sgemm, bandwidth = ceilings(result)
    if workload.kind == "prefill":
        operations = machine.prefill_operations(config, workload.length)
        return figure(workload, max(operations / sgemm, machine.token_bytes(config, 0) / bandwidth))
    if workload.kind == "decode":
        return figure(workload, step_bytes(result, workload) / bandwidth)
    head = 2 * config.n_embd * config.vocab_size * (workload.length - 2)
    return figure(workload, (machine.prefill_operations(config, workload.length) + head) / sgemm)


def step_bytes(result: dict[str, Any], workload: Workload) -> float:
    """Return the bytes a decoding step reads when the cache is half filled."""
    seen = workload.length + workload.new / 2
    return machine.token_bytes(plan(result["model"]).config, seen, workload.batch)


def ratios(result: dict[str, Any], workloads: list[Workload]) -> Iterator[str]:
    """Yield each peer's time as a multiple of npgpt's, compared round by round."""
    yield row("npgpt against", *(workload.name for workload in workloads))
    yield row(*["---"] * (len(workloads) + 1))
    for engine in engines(result):
        if engine.startswith(OURS) and engine != BEFORE:
            continue
        yield row(engine, *(told(paired(result, engine, workload.name)) for workload in workloads))


def paired(result: dict[str, Any], engine: str, workload: str) -> list[float]:
    """Return the engine's seconds divided by npgpt's, round by round."""
    ours, theirs = samples(result, OURS, workload), samples(result, engine, workload)
    return [theirs[round_] / ours[round_] for round_ in sorted(ours.keys() & theirs.keys())]


def told(found: list[float]) -> str:
    """Return a ratio such as 1.23 (1.10–1.31), marked if npgpt is not ahead."""
    if not found:
        return "–"
    middle = statistics.median(found)
    word = " tie" if abs(middle - 1) <= TIE else " behind" if middle < 1 else ""
    return f"{middle:.2f} ({min(found):.2f}–{max(found):.2f}){word}"


def starts(result: dict[str, Any]) -> Iterator[str]:
    """Yield tables of the time to the first token and of imports."""
    if not result["first"]:
        return
    yield "### Process start"
    yield ""
    first = plan(result["model"]).first
    yield row("engine", f"start to first token, {first}-token prompt", "npgpt against it")
    yield row("---", "---", "---")
    by_engine = first_tokens(result)
    ours = by_engine.get(OURS, {})
    for engine, found in by_engine.items():
        pairs = [found[round_] / ours[round_] for round_ in sorted(found.keys() & ours.keys())]
        yield row(engine, f"{statistics.median(found.values()):.2f} s", "–" if engine == OURS else told(pairs))
    yield ""
    yield row("whole process; in one: mapping, `npgpt.load`", "seconds")
    yield row("---", "---")
    for name in dict.fromkeys(line["name"] for line in result["starts"]):
        seconds = [line["seconds"] for line in result["starts"] if line["name"] == name]
        yield row(f"`{name}`", f"{statistics.median(seconds):.3f} ({min(seconds):.3f}–{max(seconds):.3f})")
    yield ""


def memory(result: dict[str, Any], planned: Plan) -> Iterator[str]:
    """Yield a table of peak resident memory and of the proportional set size afterwards."""
    if not result["memory"]:
        return
    yield "### Memory, MB"
    yield ""
    yield row(
        "engine", *(f"peak at {n}" for n in planned.memory), *(f"proportional share after {n}" for n in planned.memory)
    )
    yield row(*["---"] * (1 + 2 * len(planned.memory)))
    for engine in dict.fromkeys(line["engine"] for line in result["memory"]):
        found = {line["length"]: line for line in result["memory"] if line["engine"] == engine}
        yield row(
            engine,
            *(
                f"{found[n][key] / MB:,.0f}" if n in found else "–"
                for key in ("peak", "proportional")
                for n in planned.memory
            ),
        )
    weights = machine.token_bytes(planned.config, 0) + 4 * planned.config.n_positions * planned.config.n_embd
    caches = [machine.token_bytes(planned.config, n) - machine.token_bytes(planned.config, 0) for n in planned.memory]
    yield row("weights and cache alone", *(f"{(weights + cache) / MB:,.0f}" for cache in caches), *["–"] * len(caches))
    yield ""


def targets(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield each aim with its result."""
    for result in results:
        yield from (
            row(f"{result['model']}: {aim}", found, "met" if met else "**missed**") for aim, found, met in aims(result)
        )


Aim = tuple[str, str, bool]


def aims(result: dict[str, Any]) -> Iterator[Aim]:
    """Yield this shape's aims: the aim, the measured value, and whether it is met."""
    planned = plan(result["model"])
    peers = [e for e in engines(result) if not e.startswith(OURS) and e not in INT8]
    for name in ("prefill 128", "prefill 1024", "decode after 128", "decode after 900"):
        found = {e: pairs for e in peers if (pairs := paired(result, e, name))}
        if found:
            nearest = min(found, key=lambda e: statistics.median(found[e]))
            floor = 1.0 if name.startswith("prefill") else 1 - TIE
            met = statistics.median(found[nearest]) > floor
            yield f"{name}: ahead of every float32 peer", f"{nearest}: {told(found[nearest])}", met
    rounds = dict(enumerate(result["ceilings"]))
    if ours := samples(result, OURS, "prefill 1024"):
        operations = machine.prefill_operations(planned.config, 1024)
        shares = [operations / seconds / rounds[r]["sgemm"] for r, seconds in ours.items()]
        yield share("prefill 1024: at least 80 % of sgemm", shares, 0.8)
    for name in ("decode after 128", "decode after 900"):
        if ours := samples(result, OURS, name):
            needed = step_bytes(result, planned.named(name))
            shares = [needed / seconds / rounds[r]["bandwidth"] for r, seconds in ours.items()]
            yield share(f"{name}: at least 90 % of the bandwidth", shares, 0.9)
    if eight := samples(result, OURS, "batch 8"):
        one = samples(result, OURS, "batch 1")
        gain = statistics.median(8 * one[r] / eight[r] for r in eight.keys() & one.keys())
        yield "batch of 8: at least 4 times one sequence", f"{gain:.2f} times", gain >= 4
    yield from start_aims(result)
    yield from memory_aims(result, planned)


def share(aim: str, shares: list[float], floor: float) -> Aim:
    """Return the fraction of a ceiling that was reached, round by round."""
    middle = statistics.median(shares)
    return aim, f"{middle:.0%} ({min(shares):.0%}–{max(shares):.0%})", middle >= floor


def first_tokens(result: dict[str, Any]) -> dict[str, Samples]:
    """Return each engine's seconds from process start to the first token."""
    found: dict[str, Samples] = {}
    for line in result["first"]:
        found.setdefault(line["engine"], {})[line["round"]] = line["seconds"]
    return found


def start_aims(result: dict[str, Any]) -> Iterator[Aim]:
    """Yield the aims for first token, --help and mapping, which only gpt2 has."""
    if result["model"] != "gpt2":
        return
    middles = {engine: statistics.median(seconds.values()) for engine, seconds in first_tokens(result).items()}
    peers = [seconds for engine, seconds in middles.items() if not engine.startswith(OURS) and engine not in INT8]
    if OURS in middles:
        told = f"{middles[OURS]:.2f} s" + (f", the fastest peer {min(peers):.2f} s" if peers else "")
        met = middles[OURS] < min(0.5, *peers)
        yield "process start to first token: under 0.5 s, ahead of every float32 peer", told, met
    for name, limit in (("npgpt --help", 0.15), ("mapping the weights", 0.02)):
        if seconds := [line["seconds"] for line in result["starts"] if line["name"] == name]:
            middle = statistics.median(seconds)
            yield f"`{name}` under {limit} s", f"{middle:.3f} s", middle < limit


def memory_aims(result: dict[str, Any], planned: Plan) -> Iterator[Aim]:
    """Yield the aims for memory: weights, cache and a stated surplus."""
    room = {"gpt2": 120, "gpt2-xl": 300}.get(result["model"])
    for line in result["memory"]:
        if room and line["engine"] == OURS and line["length"] == 1024:
            weights = machine.token_bytes(planned.config, 1024) + 4 * planned.config.n_positions * planned.config.n_embd
            more = (line["peak"] - weights) / MB
            yield f"peak at 1024 tokens: weights, cache and at most {room} MB", f"{more:.0f} MB more", more <= room


def chart(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the first model's main workloads as bars, one for each engine; draw nothing without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: pip install matplotlib")
        return
    result = results[0]
    matplotlib.rcParams.update({"svg.hashsalt": "npgpt", "svg.fonttype": "none", "font.family": "sans-serif"})
    workloads = plan(result["model"]).workloads
    chief = [w for w in workloads if w.name in ("prefill 1024", "prefill 128", "decode after 128", "batch 8")]
    shown = [workload for workload in chief or workloads[:4] if samples(result, OURS, workload.name)]
    if not shown:
        return
    names = [engine for engine in engines(result) if engine == OURS or not engine.startswith(OURS)]
    lines = (len(shown) + 1) // 2
    picture = Figure(figsize=(10, 0.32 * len(names) * lines + 1.2), layout="constrained")
    for place, workload in enumerate(shown, start=1):
        axis, bars = picture.add_subplot(lines, 2, place), {}
        for engine in names:
            if found := samples(result, engine, workload.name):
                seconds = statistics.median(found.values())
                bars[engine] = seconds if workload.kind == "prefill" else workload.batch / seconds
        colours = ["#1b6ca8" if name == OURS else "#c9c9c9" if name in INT8 else "#8fb4cf" for name in bars]
        drawn = axis.barh(list(bars), list(bars.values()), color=colours)
        axis.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
        unit = "seconds, less is better" if workload.kind == "prefill" else "tokens a second, more is better"
        axis.set_title(f"{workload.name}: {unit}", fontsize=9, loc="left")
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, metadata={"Date": None})


def row(*cells: str) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
