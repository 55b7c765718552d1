"""Naming schemes: which names a checkpoint has. A new one is a file and a line here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import NpgptError
from ..tensor import Tensor
from . import huggingface, llamacpp, llmc, llms_from_scratch, nanogpt, openai
from .scheme import Scheme

# in the order in which they are tried: minGPT's names are nanoGPT's too, and both are Hugging Face's
SCHEMES: tuple[Scheme, ...] = (
    nanogpt.MINGPT,
    nanogpt.NANOGPT,
    huggingface.SCHEME,
    llms_from_scratch.SCHEME,
    openai.SCHEME,
    llamacpp.SCHEME,
    llmc.SCHEME,
)
# torch.compile's, DistributedDataParallel's, Lightning's
WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module|model)\.)+|(?<=\.)(?:_orig_mod|module)\.")


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without what wrapping a module puts into its names, where that leaves them apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = WRAPPERS.sub("", name)
        found[name if bare in found or (bare != name and bare in tensors) else bare] = tensor
    return found


def choose(name: str | None, tensors: Mapping[str, Tensor], source: str) -> Scheme:
    """The scheme of that name, or, for None, the one that recognises the tensors.

    Raises NpgptError for a name that there is not, and where no scheme recognises them.
    """
    if name is not None:
        scheme = next((scheme for scheme in SCHEMES if scheme.name == name), None)
        if scheme is None:
            known = ", ".join(scheme.name for scheme in SCHEMES)
            raise NpgptError(f"there is no naming scheme {name!r:.80}; there are {known}")
        return scheme
    scheme = next((scheme for scheme in SCHEMES if scheme.recognises(tensors)), None)
    if scheme is None:
        names = ", ".join([tensor.name for tensor in tensors.values()][:3]) or "no tensors at all"
        known = ", ".join(scheme.title for scheme in SCHEMES)
        raise NpgptError(f"{source} is no GPT-2 that npgpt knows: it has {names:.300}, …, and known are {known}")
    return scheme
