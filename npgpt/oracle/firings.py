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
from .textbook import located

Place = tuple[str, str, bool]  # the path of a module's part, the stage that it shows, and whether as its input
THIRDS = ("attn.query", "attn.key", "attn.value")  # of linear layers that together are attn.c_attn
HOLDING = {"wte", "wpe", "ln_f", "ln_1", "attn.c_attn", *THIRDS, "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}


@dataclass
class Firings:
    """What hooks see of one call on ids [B, T]. fired: by the path of a part, how often it ran; stages as float64."""

    places: Sequence[Place]
    shape: tuple[int, int]
    fired: dict[str, int] = field(default_factory=dict)
    stages: dict[str, NDArray[Any]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)  # of blocks, as they first ran
    shared: list[list[str]] = field(default_factory=list)  # paths of one and the same part with tensors

    @contextmanager
    def of(self, module: Any) -> Iterator[None]:
        """Watch the module within. Of a part that stands at several places the nth firing is the nth place's."""
        parts = dict(module.named_modules(remove_duplicate=False))
        known = [path for path in dict.fromkeys(path for path, _, _ in self.places) if path in parts]
        self.fired = dict.fromkeys(known, 0)
        paths: dict[int, list[str]] = {}
        for path in known:
            paths.setdefault(id(parts[path]), []).append(path)
        handles = []
        for group in paths.values():
            before, after = self._hooks(group)
            part = parts[group[0]]
            handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
            if len(group) > 1 and any(self._holds(path) for path in group):
                self.shared.append(group)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, paths: Sequence[str]) -> tuple[Callable[[Any, Any], None], Callable[[Any, Any, Any], None]]:
        """Return what runs before and after a part that stands at these places."""
        ran: list[str] = []

        def before(_: Any, given: Any) -> None:
            ran.append(paths[len(ran)] if len(ran) < len(paths) else paths[0])
            self.fired[ran[-1]] += 1
            self._keep(ran[-1], given, is_input=True)

        def after(_: Any, given: Any, output: Any) -> None:
            self._keep(ran[-1], output, is_input=False)

        return before, after

    def _keep(self, path: str, value: Any, is_input: bool) -> None:
        """Take a stage from the first firing that has all tokens."""
        B, T = self.shape
        value = value[0] if isinstance(value, (tuple, list)) and value else value
        for place, stage, of_input in self.places:
            layer, _ = located(stage)
            if place == path and layer is not None and layer not in self.order:
                self.order.append(layer)
            if (place, of_input) != (path, is_input) or stage in self.stages or not hasattr(value, "shape"):
                continue
            if len(value.shape) in (2, 3) and value.shape[-2] == T:
                array = as_array(value).astype(np.float64)
                whole = array.reshape(-1, *array.shape[-2:])
                self.stages[stage] = whole if stage == "wpe" else np.broadcast_to(whole, (B, *whole.shape[1:]))

    def _holds(self, path: str) -> bool:
        """Whether it is a block, or a part with tensors."""
        return any(place == path and _local(stage) in HOLDING | {""} for place, stage, _ in self.places)

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
        inner = [path for group in self.shared for path in group[1:]]
        problems = [
            f"{_and(group)} are one and the same module, so that its weights are used {len(group)} times"
            for group in self.shared
            if not any(path.startswith(f"{other}.") for path in group[1:] for other in inner)
        ]
        if len(set(ran.values())) > 1:
            usual = min(count for count in ran.values() if count)
            problems.append(_uneven({blocks[layer]: count for layer, count in ran.items()}, usual))
        elif self.order != sorted(self.order):
            problems.append(f"the blocks ran in the order {', '.join(map(str, self.order))}")
        wrong: dict[str, list[str]] = {}
        odd: dict[str, list[str]] = {}
        for layer, counts in within.items():
            usual = min((count for count in counts.values() if count), default=0)
            if usual and set(counts.values()) != {usual}:
                line = _uneven(counts, usual)
                exchanged = min(counts.values()) == 0 and max(counts.values()) > usual
                star = line if layer is None else re.sub(rf"(?<=\.){layer}(?=\.)", "*", line)
                (wrong if exchanged else odd).setdefault(star, []).append(line)
        notes = [
            f"{line}{': its weights are used otherwise, or not at all' if 'never' in line else ''}."
            for line in _grouped(odd, len(blocks))
        ]
        return problems + _grouped(wrong, len(blocks)), notes


def _layer(stage: str) -> int | None:
    return located(stage)[0]


def _local(stage: str) -> str:
    return located(stage)[1]


def _uneven(counts: Mapping[str, int], usual: int) -> str:
    """Say what never ran, and what ran more often than is usual."""
    never = [path for path, count in counts.items() if not count]
    often = [f"{path} ran {count} times" for path, count in counts.items() if count > (1 if never else usual)]
    return "; ".join([f"{_and(never)} never ran"] * bool(never) + often)


def _grouped(lines: Mapping[str, list[str]], blocks: int) -> list[str]:
    """A line that is true of every block told once, with *."""
    return [line for star, group in lines.items() for line in ([star] if len(group) == blocks > 1 else group)]


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
