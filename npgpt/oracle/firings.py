"""Record which parts of a PyTorch module ran in one call, how often, in which order, and with which outputs.

A hook sees the output of a part, not how the output was used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .outputs import as_array
from .running import untraced
from .textbook import located
from .weights import together

THIRDS = ("attn.query", "attn.key", "attn.value")  # the outputs of separate linear layers that make up attn.c_attn
INPUTS = {"attn.c_proj": "attn.merged", "ln_2": "attn.residual"}  # parts whose input is a stage
BESIDE = {"wte": (("drop", "drop_emb"), "embedding"), "mlp.c_fc": (("act", "gelu", "1"), "mlp.act")}  # no tensors


class Place(NamedTuple):
    """Where a module shows a stage: path of the part, block and local name of the stage.

    is_input: the stage is the input of the part, not its output. is_own: the part has tensors of its own.
    """

    path: str
    layer: int | None
    local: str
    is_input: bool = False
    is_own: bool = False

    @property
    def stage(self) -> str:
        """The name of the stage."""
        return self.local if self.layer is None else f"h.{self.layer}.{self.local}".rstrip(".")


def places(owners: Mapping[str, Sequence[str]]) -> Iterator[Place]:
    """Yield where a module shows its stages. owners: its own tensor names by the canonical name that they make up."""
    for name, own in owners.items():
        part, _, kind = name.rpartition(".")
        if kind != "weight" or part == "lm_head":
            continue
        layer, local = located(part)
        paths = [each.rpartition(".")[0] for each in own]
        parent = paths[0].rpartition(".")[0]
        for path, shown in zip(paths, [local] if len(paths) == 1 else THIRDS, strict=True):
            yield Place(path, layer, shown, is_own=True)
        if local in INPUTS:
            yield Place(paths[0], layer, INPUTS[local], is_input=True)
        beside, stage = BESIDE.get(local, ((), ""))
        yield from (Place(f"{parent}.{path}".lstrip("."), layer, stage) for path in beside)
        if local == "ln_1":
            yield Place(parent, layer, "")


@dataclass
class Firings:
    """What hooks see in one call on ids [B, T]: stages in float64, and how often each part ran, by path.

    Blocks are numbered in the order in which they ran: the second block that runs is h.1, whatever its index. gradients
    are those of the stages, by their names, once the loss has been run backwards.
    """

    places: Sequence[Place]
    shape: tuple[int, int]
    fired: dict[str, int] = field(default_factory=dict)
    stages: dict[str, NDArray[Any]] = field(default_factory=dict)
    turns: list[int] = field(default_factory=list)  # the index of each block that ran, in order
    shared: list[list[Place]] = field(default_factory=list)  # places that share one block or one part with tensors
    gradients: dict[str, NDArray[Any]] = field(default_factory=dict)

    @contextmanager
    def of(self, module: Any) -> Iterator[None]:
        """Watch the module while the context is open."""
        parts = dict(module.named_modules(remove_duplicate=False))
        shown: dict[Any, dict[str, list[Place]]] = {}
        for place in self.places:
            if place.path in parts:
                shown.setdefault(parts[place.path], {}).setdefault(place.path, []).append(place)
        with ExitStack() as hooks:
            for part, paths in shown.items():
                before, after = self._hooks([*paths.values()])
                hooks.enter_context(part.register_forward_pre_hook(untraced(before)))
                hooks.enter_context(part.register_forward_hook(untraced(after)))
                self.fired |= dict.fromkeys(paths, 0)
                firsts = [group[0] for group in paths.values()]
                if len(firsts) > 1 and (firsts[0].is_own or not firsts[0].local):
                    self.shared.append(firsts)
            yield

    def _hooks(self, shown: list[list[Place]]) -> tuple[Callable[[Any, Any], None], Callable[[Any, Any, Any], None]]:
        """Return hooks to run before and after a part. shown: its stages at each of its paths, used in turn."""
        layers, is_block = {group[0].layer for group in shown}, not shown[0][0].local
        coming, known = cycle(shown), {place.stage for place in self.places}
        here, turn = shown[0], 0

        def before(_: Any, given: Any) -> None:
            nonlocal here, turn
            here = next(coming)
            path, layer = here[0].path, here[0].layer
            self.fired[path] += 1
            if layer is not None and (is_block or not self.turns or (len(layers) == 1 and self.turns[-1] != layer)):
                self.turns.append(layer)
            turn = len(self.turns) - 1
            keep(given, True)

        def keep(value: Any, is_input: bool) -> None:
            """Keep the first value of a stage that has all tokens."""
            value = value[0] if isinstance(value, (tuple, list)) and value else value
            sizes = tuple(getattr(value, "shape", ()))
            for place in here if len(sizes) in (2, 3) and sizes[-2] == self.shape[1] else ():
                stage = place.stage if place.layer is None else place._replace(layer=turn).stage
                if place.is_input == is_input and stage in known and stage not in self.stages:
                    whole = as_array(value).astype(np.float64).reshape(-1, *sizes[-2:])
                    rows = self.shape[0] if stage != "wpe" else len(whole)
                    self.stages[stage] = np.broadcast_to(whole, (rows, *whole.shape[1:]))
                    self.await_gradient(stage, value)

        return before, lambda part, given, output: keep(output, False)

    def await_gradient(self, stage: str, value: Any) -> None:
        """Have a tensor's gradient kept when the loss is run backwards.

        The hook is the node's that made it: a tensor's own would stay there if the tensor was changed in place before.
        """
        node, place = getattr(value, "grad_fn", None), getattr(value, "output_nr", 0)

        def keep(gradients: Any) -> None:
            if (gradient := gradients[place]) is not None:
                found = as_array(gradient).astype(np.float64).reshape(-1, *gradient.shape[-2:])
                self.gradients[stage] = found.sum(axis=0, keepdims=True) if stage == "wpe" else found

        if node is not None:
            node.register_prehook(untraced(keep))

    def told(self) -> tuple[list[str], list[str]]:
        """Return problems and notes. A part that never ran is only noted, since its weights may be used directly."""
        if not any(self.fired.values()):
            return [], ["None of the model's parts ran as a module: only the logits are compared."]
        blocks = {place.layer: place.path for place in self.places if not place.local}
        within: dict[int | None, dict[str, int]] = {}
        for place in self.places:
            if place.path in self.fired and place.is_own:
                within.setdefault(place.layer, {})[place.path] = self.fired[place.path]
        most = {layer: max(counts.values()) for layer, counts in within.items()}
        ran = {path: self.fired.get(path, 0) or most.get(layer, 0) for layer, path in blocks.items()}
        order = list(dict.fromkeys(self.turns))
        problems = self._sharing(len(blocks))
        if uneven := _uneven(ran):
            problems.append(uneven)
        elif order != sorted(order):
            problems.append(f"the blocks ran in the order {', '.join(map(str, order))}")
        wrong: list[tuple[str, str]] = []
        odd: list[tuple[str, str]] = []
        for layer, counts in within.items():
            if line := _uneven(counts):
                exchanged = 0 in counts.values() and len(set(counts.values())) > 2
                (wrong if exchanged else odd).append((_starred(line, layer), line))
        unseen = " as a module: its weights are used directly, or not at all"
        notes = [f"{line}{unseen if 'never' in line else ''}." for line in together(odd, len(blocks))]
        return problems + together(wrong, len(blocks)), notes

    def _sharing(self, blocks: int) -> list[str]:
        """Return blocks, and parts of blocks, that appear in several places but should be separate."""
        inner = tuple(f"{place.path}." for group in self.shared for place in group[1:])
        told = []
        for group in self.shared:
            if not any(place.path.startswith(inner) for place in group):
                paths, layers = [place.path for place in group], {place.layer for place in group}
                line = f"{_and(paths)} are the same module, so its weights are used {len(group)} times"
                told.append((_starred(line, layers.pop() if len(layers) == 1 else None), line))
        return together(told, blocks)


def _starred(line: str, layer: int | None) -> str:
    """Return a line about one block with its number in paths replaced by *."""
    return line if layer is None else re.sub(rf"(?<=\.){layer}(?=\.)", "*", line)


def _uneven(counts: Mapping[str, int]) -> str:
    """Return what never ran and what ran more often than others, or "" if all ran equally often."""
    if len(set(counts.values())) < 2:
        return ""
    never = [path for path, count in counts.items() if not count]
    usual = 1 if never else min(counts.values())
    often = [f"{path} ran {count} times" for path, count in counts.items() if count > usual]
    return "; ".join(([f"{_and(never)} never ran"] if never else []) + often)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
