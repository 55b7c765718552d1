"""Compute the loss of a PyTorch module, its own if it takes targets, and take the gradients of it.

torch is never imported: the tensors' own methods are used, and torch where it is imported already. The gradients come
from torch.autograd.grad, so that no parameter's .grad changes and no optimizer runs from a hook.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError
from ..gradients import cross_entropy
from .backward import IGNORED
from .conditions import as_judged
from .firings import Firings
from .modules import Module, array_tensor, ids_for
from .outputs import as_array, logits_of, raised
from .running import Ids, called
from .weights import listed

LABELS, TARGETS = "labels", ("targets", "target")  # arguments of a module's forward
NANOGPT_IGNORED = -1  # nanoGPT's and minGPT's ignore_index
WRAPPED = ("module", "_orig_mod", "_forward_module")  # of DataParallel, torch.compile and Fabric
HALVES = ("torch.float16", "torch.bfloat16")
OWN = "Its own loss is checked, forward({name}=…){how}."
SHIFTED = " with labels that are the ids themselves, which the module shifts, as transformers' models do"
BUILT = "Its loss is npgpt's own, the mean cross-entropy of its logits{why}: how it is trained is not checked."
EAGER = "Backwards it was run without torch.compile."


@dataclass(frozen=True)
class Step:
    """One step of training without its update: stages, the loss, "d." gradients; notes and problems."""

    arrays: Mapping[str, NDArray[Any]]
    notes: Sequence[str]
    problems: Sequence[str]


def step(module: Module, token_ids: Ids, targets: Ids) -> Step:
    """Run a module on ids with targets [B, T], and its loss backwards. The module is left as it was.

    Raises NpgptError if it raises, for a loss that is not one number, and where there is no gradient.
    """
    own, config = module.module, module.config
    parameters = dict(own.named_parameters(remove_duplicate=False))
    parts = {part for source in module.stored.sources.values() for part in source.parts}
    own_names = {part: module.stored.bare[part].name for part in parts}
    held = {name: parameters[name] for name in own_names.values() if name in parameters}

    def run(**given: Any) -> tuple[Firings, Any]:
        ids = ids_for(own, token_ids)
        seen = Firings(module.places, (len(token_ids), token_ids.shape[1]))
        with seen.of(own):
            return seen, own(ids, **given) if given else called(own, ids, own.forward)

    with differentiable() as torch, as_judged(own, module.changed):
        try:
            seen, output, loss, note = run_with_loss(run, own, targets, config.vocab_size)
            if (logits := tensor_of_logits(output, config.vocab_size)) is not None:
                seen.await_gradient("logits", logits)
            found, unused, frozen = gradients(torch, loss, held)
        except NpgptError:
            raise
        except Exception as error:
            raise NpgptError(f"{type(own).__name__}, run with its loss backwards, raises {raised(error)}") from error
    notes = [note, *([EAGER] if any(hasattr(part, "_orig_mod") for part in own.modules()) else [])]
    arrays: dict[str, NDArray[Any]] = {**seen.stages, "loss": as_array(loss)}
    if logits is not None:
        arrays["logits"] = as_array(logits).astype(np.float64)
    arrays |= {f"d.{stage}": gradient for stage, gradient in seen.gradients.items()}
    bare = {p: array_tensor(Path("the module"), name, found[name]) for p, name in own_names.items() if name in found}
    stored = replace(module.stored, bare=bare)
    sources = {name: source for name, source in stored.sources.items() if source.parts}
    whole = [name for name, source in sources.items() if all(part in bare for part in source.parts)]
    arrays |= {f"d.{name}": stored.in_float64(name) for name in whole}
    problems = []
    if cold := [name for name, source in sources.items() if any(own_names[part] in frozen for part in source.parts)]:
        problems.append(f"no gradient for {listed(cold, config.n_layer)}: frozen (requires_grad is False)")
    if off := [name for name in whole if any(own_names[part] in unused for part in sources[name].parts)]:
        problems.append(f"the loss does not depend on {listed(off, config.n_layer)} (gradient None): detached?")
    return Step(arrays, notes, problems)


def takes(module: Any) -> str:
    """Return the name under which a module, or what it wraps, takes the targets of its loss; "" if it takes none."""
    while module is not None:
        with suppress(TypeError, ValueError):
            given = inspect.signature(module.forward).parameters
            if name := next((name for name in (LABELS, *TARGETS) if name in given), ""):
                return name
        module = next((inner for name in WRAPPED if (inner := getattr(module, name, None)) is not None), None)
    return ""


def spellings(name: str, targets: Ids) -> list[Ids]:
    """Return targets [B, T] as a module may expect them under this name.

    Labels are the ids, from which it takes the next itself: they cannot state what follows the last token. Where
    nothing is to be predicted, others than PyTorch's −100 may be meant.
    """
    if name == LABELS:
        labels = np.full_like(targets, IGNORED)
        labels[:, 1:] = targets[:, :-1]
        return [labels]
    return [targets, np.where(targets == IGNORED, NANOGPT_IGNORED, targets)][: 1 + bool((targets == IGNORED).any())]


@contextmanager
def differentiable() -> Iterator[Any]:
    """Have gradients computed, whatever the caller's mode, and yield torch. Raises NpgptError without it.

    Nothing is compiled: in torch.compile's graphs a stage may be several tensors, each with a part of the gradient.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        raise NpgptError("gradients of a module need PyTorch: for another framework, give the gradients by name")
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            modes.enter_context(torch.compiler.set_stance("force_eager"))
        yield torch


def run_with_loss(
    run: Callable[..., tuple[Firings, Any]], module: Any, targets: Ids, vocab_size: int
) -> tuple[Firings, Any, Any, str]:
    """Run a module with targets [B, T]; return what hooks saw, its output, the loss, and a note on whose loss it is.

    Of two spellings of the targets, that counts whose loss is nearer to its logits' cross-entropy. Raises NpgptError
    for a loss that is not one number; what the module raises is raised.
    """
    name, why = takes(module), ""
    if name == LABELS and (targets[:, -1] != IGNORED).any():
        name, why = "", ", since its labels cannot state the last token's target"
    if not name:
        seen, output = run()
        return seen, output, built_loss(output, targets, vocab_size), BUILT.format(why=why)
    found: list[tuple[float, tuple[Firings, Any, Any, str]]] = []
    failed: Exception | None = None
    for spelt in spellings(name, targets):
        try:
            seen, output = run(**{name: ids_for(module, spelt)})
        except Exception as error:  # such as an index out of range for another ignore_index
            failed = error
            continue
        loss = loss_of(output, f"{type(module).__name__}.forward({name}=…)")
        other = f", with {NANOGPT_IGNORED} where nothing is to be predicted" if (spelt == NANOGPT_IGNORED).any() else ""
        note = OWN.format(name=name, how=SHIFTED if name == LABELS else other)
        found.append((distance(output, loss, targets, vocab_size), (seen, output, loss, note)))
    if not found:
        assert failed is not None
        raise failed
    return min(found, key=lambda each: each[0])[1]


def loss_of(output: Any, title: str) -> Any:
    """Return the loss in what a module returns: its field "loss", or the one number. Raises NpgptError for others."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        items = output if isinstance(output, (tuple, list)) else [output]
        tensors = [item for item in items if hasattr(item, "numel")]
        single = [item for item in tensors if item.numel() == 1]
        loss = next(iter(single), None)
        if loss is None:
            shapes = ", ".join(str(list(item.shape)) for item in tensors) or "nothing"
            raise NpgptError(f"{title} returns {shapes}, and no loss of one number: is reduction='mean' missing?")
    if not hasattr(loss, "numel") or loss.numel() != 1:
        shape = list(getattr(loss, "shape", ())) or type(loss).__name__
        raise NpgptError(f"{title} returns a loss of {shape}, but it must be one number: is reduction='mean' missing?")
    return loss.reshape(())


def distance(output: Any, loss: Any, targets: Ids, vocab_size: int) -> float:
    """Return how far a loss is from the cross-entropy of the logits, infinite where that cannot be told."""
    try:
        logits = logits_of(output, vocab_size).astype(np.float64)
        gap = abs(float(loss.detach()) - cross_entropy(logits, targets, IGNORED))
    except (NpgptError, ValueError, IndexError):
        return float("inf")
    return gap if np.isfinite(gap) else float("inf")


def tensor_of_logits(output: Any, vocab_size: int) -> Any:
    """Return the tensor of logits in what a module returns, None if there is none."""
    if isinstance(output, Mapping):
        items: Sequence[Any] = [output.get("logits"), *output.values()]
    else:
        items = output if isinstance(output, (tuple, list)) else [getattr(output, "logits", output)]
    return next((x for x in items if hasattr(x, "log_softmax") and tuple(x.shape)[-1:] == (vocab_size,)), None)


def built_loss(output: Any, targets: Ids, vocab_size: int) -> Any:
    """Return the mean cross-entropy of a module's logits [B, T, V], in float32 for half precision.

    Raises NpgptError for logits without a gradient or of other positions.
    """
    logits = tensor_of_logits(output, vocab_size)
    if logits is None:
        raise NpgptError(f"there are no logits [B, T, {vocab_size}] in its output to make a loss of")
    rows = targets.reshape(-1)
    if logits.numel() != len(rows) * vocab_size:
        raise NpgptError(f"its logits are {list(logits.shape)}, but a loss needs all of {[*targets.shape, vocab_size]}")
    counting = np.flatnonzero(rows != IGNORED)
    chosen = logits.reshape(-1, vocab_size)[counting.tolist()]
    chosen = chosen.float() if str(chosen.dtype) in HALVES else chosen
    return -chosen.log_softmax(-1)[range(len(counting)), rows[counting].tolist()].mean()


def gradients(torch: Any, loss: Any, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the gradients of a loss by the parameters' names, zeros where the loss does not depend on one, and the
    names of these and of frozen parameters. A shared parameter has all of its gradient under each name.

    Raises NpgptError if the loss or all parameters are detached.
    """
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if len(frozen) == len(parameters):
        raise NpgptError("there is no gradient: every parameter is frozen (requires_grad is False)")
    if not loss.requires_grad:
        raise NpgptError("there is no gradient: the loss is detached from the parameters (detach(), no_grad or item())")
    wanted = {id(parameter): parameter for parameter in parameters.values() if parameter.requires_grad}
    found = dict(zip(wanted, torch.autograd.grad(loss, [*wanted.values()], allow_unused=True), strict=True))
    arrays, unused = {}, []
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            gradient = found[id(parameter)]
            unused += [name] if gradient is None else []
            arrays[name] = as_array(gradient if gradient is not None else parameter.new_zeros(parameter.shape))
    return arrays, unused, frozen
