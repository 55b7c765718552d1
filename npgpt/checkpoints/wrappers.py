"""Find the GPT-2 among a file's tensors: strip the prefixes that wrappers add to names, and report all other tensors.

A path is the prefix before the GPT-2's own names, such as "model.transformer." in Lightning's checkpoints. It may
contain any attribute name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import NpgptError
from ..parameters import count_blocks
from .names import LAYERS, SCHEMES
from .tensor import Tensor

# Parts that torch.compile, DistributedDataParallel, DeepSpeed, Fabric, FSDP, activation checkpointing and
# tf.train.Checkpoint insert into names.
WRAPPER = r"(?:_orig_mod|_?module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
WITHIN = re.compile(rf"(?:^|(?<=\.)){WRAPPER}|/\.ATTRIBUTES/VARIABLE_VALUE\Z")
OWN_ATTRIBUTE = re.compile(rf"(?:(?:^|(?<=\.))transformer\.(?:{WRAPPER})*)+\Z")  # holds a GPT-2's body
LEADING = re.compile(r"^(?:(?:model|transformer)\.)+")
TABLES = tuple(
    dict.fromkeys(n for scheme in SCHEMES for n, (ours, _) in scheme.tensors.items() if ours == "wte.weight")
)
# Prefixes of the names of blocks, such as h. and trf_blocks. Blocks outside a GPT-2's path belong to it nevertheless.
BLOCKS = tuple({re.split(r"(?<=[./])", n)[0] for scheme in SCHEMES for n in scheme.tensors if "*" in n})
OUTPUT_HEADS = ("lm_head.weight", "lm_head.decoder.weight", "out_head.weight")  # they may be outside their GPT-2's path
# Other heads that transformers, TRL and similar programs put on a GPT-2's last hidden state.
OTHER_HEADS = re.compile(r"(?:v_head|value_head|score|classifier|multiple_choice_head|qa_outputs|summary)\..+")
MOST_TABLES = 8  # each is compared with all names
MOST_PARTS = 64  # of a dotted name; all prefixes of a path are searched


@dataclass(frozen=True)
class Located:
    """A GPT-2's tensors by its program's names, and the tensors left out: other heads, and those of other modules."""

    tensors: Mapping[str, Tensor]
    heads: tuple[Tensor, ...] = ()
    beside: tuple[Tensor, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a line for each kind of tensors left out."""
        heads = f"ignored, not a language model's head: {_listed(self.heads)}"
        beside = f"ignored, not part of the GPT-2: {_listed(self.beside)}"
        return (heads,) * bool(self.heads) + (beside,) * bool(self.beside)


def unwrapped(tensors: Mapping[str, Tensor], *, leading: bool = True) -> dict[str, Tensor]:
    """Return the tensors without the wrappers' parts of their names, except where two names would become equal.

    leading: also strip `model.` and `transformer.` from the beginning of names.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = WITHIN.sub("", name)
        bare = LEADING.sub("", bare) if leading else bare
        found[name if bare in found or (bare != name and bare in tensors) else bare] = tensor
    return found


def located(tensors: Mapping[str, Tensor], source: str) -> Located:
    """Return the only GPT-2 among the tensors; if none is complete, return all tensors, on which loading then reports.

    Raises NpgptError, with their paths, if there are several.
    """
    names = unwrapped(tensors, leading=False)
    paths = {  # {path: the prefix of the same names in the file, with wrappers}
        name.removesuffix(table): tensor.name.removesuffix(table) if tensor.name.endswith(table) else ""
        for table in TABLES
        for name, tensor in names.items()
        if (name == table or name.endswith(f".{table}")) and tensor.name.count(".") <= MOST_PARTS
    }
    if len(paths) > MOST_TABLES:
        raise _several(source, paths)
    found = {path: _at(names, path, OWN_ATTRIBUTE.sub("", stored)) for path, stored in paths.items()}
    found = {path: part for path, part in found.items() if any(scheme.recognises(part.tensors) for scheme in SCHEMES)}
    whole = [path for path, part in found.items() if _is_whole(part.tensors)]
    if len(whole) > 1:
        raise _several(source, whole)
    candidates = whole or [*found]
    return found[candidates[0]] if len(candidates) == 1 else Located(unwrapped(tensors))


def _at(names: Mapping[str, Tensor], path: str, stored: str) -> Located:
    """Return the tensors at a path, and the output head, which may be above it.

    stored is the prefix of the names in the file, with wrappers. Since `transformer.` is GPT-2's own attribute, tensors
    directly outside it must be the GPT-2's too; loading reports unknown ones.
    """
    outer = OWN_ATTRIBUTE.sub("", path)
    own = {name: tensor for name, tensor in names.items() if name.startswith(path) and tensor.name.startswith(stored)}
    inner = {name.removeprefix(path): tensor for name, tensor in own.items()}
    bare = {name: tensor for name, tensor in inner.items() if not OTHER_HEADS.fullmatch(name)}
    heads = [tensor for name, tensor in inner.items() if name not in bare]
    beside, places = [], (path, *_places_above(path))
    for name, tensor in names.items():
        if name in own:
            continue
        place = next(place for place in places if name.startswith(place))
        rest = name.removeprefix(place)
        if rest in OUTPUT_HEADS and rest not in bare:
            bare[rest] = tensor
        elif OTHER_HEADS.fullmatch(rest):
            heads.append(tensor)
        elif (name.startswith(outer) and tensor.name.startswith(stored)) or rest.startswith(BLOCKS):
            bare[name if rest in bare else rest] = tensor
        else:
            beside.append(tensor)
    return Located(bare, tuple(heads), tuple(beside))


def _places_above(path: str) -> list[str]:
    """Return the paths above a path, the nearest first."""
    parts = path.split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:length]) for length in reversed(range(len(parts)))]


def _is_whole(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names include every layer of a GPT-2."""
    scheme = next(scheme for scheme in SCHEMES if scheme.recognises(tensors))
    held = scheme.translate(tensors)
    blocks = count_blocks(held)
    wanted = (layer.replace("*", str(block)) for block in range(blocks) for layer in LAYERS if layer != "lm_head")
    return blocks > 0 and all(f"{layer}.weight" in held for layer in wanted)


def _several(source: str, paths: Iterable[str]) -> NpgptError:
    shown = ", ".join(f"{path}*" for path in paths)
    return NpgptError(f"{source} contains several GPT-2s, {shown:.300}: save the one to use by itself")


def _listed(tensors: tuple[Tensor, ...]) -> str:
    shown = ", ".join(f"{tensor.name:.80} {list(tensor.shape)}" for tensor in tensors[:3])
    return f"{shown} and {len(tensors) - 3} more" if len(tensors) > 3 else shown
