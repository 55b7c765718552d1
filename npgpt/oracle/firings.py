"""Which parts of a PyTorch module ran in one call, how often and in which order, and what each of them gave.

A hook sees what a part gave, not how that was used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .outputs import as_array
from .running import untraced
from .textbook import located

Place = tuple[str, str, bool]  # the path of a module's part, the stage that it shows, and whether as its input
THIRDS = ("attn.query", "attn.key", "attn.value")  # of linear layers that together are attn.c_attn
HOLDING = {"wte", "wpe", "ln_f", "ln_1", "attn.c_attn", *THIRDS, "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}


@dataclass
class Firings:
    """What hooks see of one call on ids [B, T]. fired: by the path of a part, how often it ran; stages as float64.

    A block's stages go by its turn, not by its number: the second block that runs is h.1, whichever it is.
    """

    places: Sequence[Place]
    shape: tuple[int, int]
    fired: dict[str, int] = field(default_factory=dict)
    stages: dict[str, NDArray[Any]] = field(default_factory=dict)
    turns: list[int] = field(default_factory=list)  # the number of each block that ran
    shared: list[list[str]] = field(default_factory=list)  # paths of one and the same part with tensors

    @contextmanager
    def of(self, module: Any) -> Iterator[None]:
        """Watch the module within."""
        parts = dict(module.named_modules(remove_duplicate=False))
        shown: dict[str, list[tuple[str, bool]]] = {}
        for path, stage, is_input in self.places:
            if path in parts:
                shown.setdefault(path, []).append((stage, is_input))
        self.fired = dict.fromkeys(shown, 0)
        paths: dict[int, list[str]] = {}
        for path in shown:
            paths.setdefault(id(parts[path]), []).append(path)
        handles = []
        try:
            for group in paths.values():
                before, after = self._hooks({path: shown[path] for path in group})
                part = parts[group[0]]
                handles.append(part.register_forward_pre_hook(untraced(before)))
                handles.append(part.register_forward_hook(untraced(after)))
                if len(group) > 1 and any(_local(stage) in HOLDING | {""} for stage, _ in shown[group[0]]):
                    self.shared.append(group)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(
        self, shown: Mapping[str, list[tuple[str, bool]]]
    ) -> tuple[Callable[[Any, Any], None], Callable[[Any, Any, Any], None]]:
        """Return what runs before and after a part. shown: its stages at each place where it stands; of several in one
        block the nth firing in a turn is the nth.
        """
        paths, layers = list(shown), {_layer(stage) for stages in shown.values() for stage, _ in stages}
        is_block = any(not _local(stage) for stages in shown.values() for stage, _ in stages)
        kinds = list(dict.fromkeys(tuple((_local(stage), of) for stage, of in stages) for stages in shown.values()))
        firings: list[int] = []  # the turn of each

        def before(_: Any, given: Any) -> None:
            path = paths[len(firings)] if len(firings) < len(paths) else paths[0]
            layer = _layer(shown[path][0][0])
            self.fired[path] += 1
            if layer is not None and (is_block or not self.turns or (len(layers) == 1 and self.turns[-1] != layer)):
                self.turns.append(layer)
            firings.append(len(self.turns) - 1)
            keep(given, True)

        def after(_: Any, given: Any, output: Any) -> None:
            keep(output, False)

        def keep(value: Any, is_input: bool) -> None:
            turn = firings[-1]
            for local, of_input in kinds[min(firings.count(turn), len(kinds)) - 1]:
                if of_input == is_input:
                    self._take(local if layers == {None} else f"h.{turn}.{local}".rstrip("."), value)

        return before, after

    def _take(self, stage: str, value: Any) -> None:
        """Keep the first of a stage that has all tokens."""
        (B, T), layer = self.shape, _layer(stage)
        value = value[0] if isinstance(value, (tuple, list)) and value else value
        known = any(place == stage for _, place, _ in self.places) or layer is None
        if not known or stage in self.stages or len(getattr(value, "shape", ())) not in (2, 3) or value.shape[-2] != T:
            return
        array = as_array(value).astype(np.float64)
        whole = array.reshape(-1, *array.shape[-2:])
        self.stages[stage] = whole if stage == "wpe" else np.broadcast_to(whole, (B, *whole.shape[1:]))

    def told(self) -> tuple[list[str], list[str]]:
        """Return problems and notes: what ran wrongly, and what is only to be known, since weights of a part may be
        used without running it as a module.
        """
        if not any(self.fired.values()):
            return [], ["None of its parts ran as a module: only the logits are compared."]
        blocks = {_layer(stage): path for path, stage, _ in self.places if not _local(stage)}
        within: dict[int | None, dict[str, int]] = {}
        for path, stage, is_input in self.places:
            if path in self.fired and not is_input and _local(stage) in HOLDING:
                within.setdefault(_layer(stage), {})[path] = self.fired[path]
        ran = {
            layer: self.fired.get(path, 0) or max(within.get(layer, {"": 0}).values()) for layer, path in blocks.items()
        }
        problems = self._sharing(len(blocks))
        if len(set(ran.values())) > 1:
            usual = min(count for count in ran.values() if count)
            problems.append(_uneven({blocks[layer]: count for layer, count in ran.items()}, usual))
        elif (order := list(dict.fromkeys(self.turns))) != sorted(order):
            problems.append(f"the blocks ran in the order {', '.join(map(str, order))}")
        wrong: dict[str, list[str]] = {}
        odd: dict[str, list[str]] = {}
        for layer, counts in within.items():
            usual = min((count for count in counts.values() if count), default=0)
            if usual and set(counts.values()) != {usual}:
                line = _uneven(counts, usual)
                exchanged = min(counts.values()) == 0 and max(counts.values()) > usual
                (wrong if exchanged else odd).setdefault(_starred(line, layer), []).append(line)
        notes = [
            f"{line}{' as a module: its weights are used by other means, or not at all' if 'never' in line else ''}."
            for line in _grouped(odd, len(blocks))
        ]
        return problems + _grouped(wrong, len(blocks)), notes

    def _sharing(self, blocks: int) -> list[str]:
        """Return what stands at several places, and should be several: blocks, else parts within one."""
        others = {path for group in self.shared for path in group[1:]}
        told: dict[str, list[str]] = {}
        for group in self.shared:
            if not any(path.startswith(f"{other}.") for path in group for other in others):
                line = f"{_and(group)} are one and the same module, whose weights are used {len(group)} times"
                layers = {_layer(stage) for path, stage, _ in self.places if path in group}
                told.setdefault(_starred(line, layers.pop() if len(layers) == 1 else None), []).append(line)
        return _grouped(told, blocks)


def _layer(stage: str) -> int | None:
    return located(stage)[0]


def _local(stage: str) -> str:
    return located(stage)[1]


def _starred(line: str, layer: int | None) -> str:
    """Return a line about one block with * for its number in paths."""
    return line if layer is None else re.sub(rf"(?<=\.){layer}(?=\.)", "*", line)


def _uneven(counts: Mapping[str, int], usual: int) -> str:
    """Say what never ran, and what ran more often than is usual."""
    never = [path for path, count in counts.items() if not count]
    often = [f"{path} ran {count} times" for path, count in counts.items() if count > (1 if never else usual)]
    return "; ".join(([f"{_and(never)} never ran"] if never else []) + often)


def _grouped(lines: Mapping[str, list[str]], blocks: int) -> list[str]:
    """A line that is true of every block told once, with *."""
    return [line for star, group in lines.items() for line in ([star] if len(group) == blocks > 1 else group)]


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
