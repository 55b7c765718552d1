"""Files of the real programs that are not checkpoints, and the remedies that error messages name."""

from __future__ import annotations

from pathlib import Path

import pytest

import npgpt
from npgpt.errors import NpgptError
from npgpt.parameters import to_arrays
from tests.support.models import random_arrays, small

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_of_torchs_and_the_way_out(tmp_path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import format_utils

    arrays = random_arrays(small(), dtype="float32")
    state = {f"transformer.{name}": torch.from_numpy(array) for name, array in arrays.items()}
    checkpoint.save(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    assert {path.name for path in (tmp_path / "dcp").iterdir()} == {".metadata", "__0_0.distcp"}
    for place in (tmp_path / "dcp", tmp_path / "dcp" / "__0_0.distcp", tmp_path / "dcp" / ".metadata"):
        with pytest.raises(NpgptError, match=r"part of a distributed checkpoint \(FSDP\): .*format_utils dcp_to_torch"):
            npgpt.load(place)
    format_utils.dcp_to_torch_save(str(tmp_path / "dcp"), str(tmp_path / "model.pt"))  # called by that command
    found = to_arrays(npgpt.load(tmp_path / "model.pt", n_head=3).parameters)
    assert all((found[name] == array).all() for name, array in arrays.items())
