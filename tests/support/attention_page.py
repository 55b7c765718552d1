"""Read back the numbers of an attention page."""

from __future__ import annotations

import base64
import json
import re

import numpy as np

from npgpt.parameters import Array

CODES = re.compile(r"\x1b\[[0-9;]*m")


def data_of(text: str) -> dict[str, object]:
    """Return a page's embedded data."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    data: dict[str, object] = json.loads(found[0])
    return data


def weights_of(data: dict[str, object]) -> Array:
    """Return a page's weights [L, H, T, T]."""
    L, H, T = (len(data[name]) for name in ("layers", "heads", "pieces"))  # type: ignore[arg-type]
    steps = np.frombuffer(base64.b64decode(str(data["weights"])), "<u2").reshape(L, H, -1)
    weights = np.zeros((L, H, T, T))
    query, key = np.tril_indices(T)
    weights[:, :, query, key] = steps / 65535
    return weights
