"""Write the golden files: small models run in float64 by transformers and LLMs-from-scratch.

    python -m tests.golden.make

Needs the extra parity and llms-from-scratch 1.0.19. The files let the plain tests compare with both packages where
neither is installed. Each holds the configuration, float32 weights, ids, and what the packages computed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from npgpt.checkpoints import configs
from tests.support.models import random_arrays, random_ids, small

FOLDER = Path(__file__).parent
CASES = {
    "plain": small(),
    "untied_erf_n_inner": small(
        n_embd=12, n_head=2, n_inner=17, activation_function="gelu", tie_word_embeddings=False, layer_norm_epsilon=1e-3
    ),
    "scaled_by_layer": small(n_embd=8, n_head=4, n_layer=3, scale_attn_by_inverse_layer_idx=True),
    "unscaled": small(n_embd=10, n_head=1, scale_attn_weights=False),
}


def main() -> None:
    """Run both packages and write a file a case."""
    import torch
    import transformers

    from tests.support import peers

    for name, config in CASES.items():
        ids = random_ids(config, (2, 11), seed=1)
        truth = random_arrays(config, seed=1)
        theirs = peers.transformers_outputs(peers.transformers_model(config, truth), ids)
        contents = {f"transformers/{stage}": array for stage, array in theirs.items()}
        if name == "plain":
            book = peers.llms_from_scratch_model(config, truth)
            for block in book.trf_blocks:
                block.ff.layers[1] = peers.Float64GELU()
            contents["llms_from_scratch/logits"] = peers.llms_from_scratch_logits(book, ids)
        contents |= {f"weights/{key}": array.astype(np.float32) for key, array in truth.items()}
        contents["config"] = np.array(json.dumps(configs.to_dict(config)))
        contents["made_with"] = np.array(f"torch {torch.__version__}, transformers {transformers.__version__}")
        np.savez_compressed(FOLDER / f"{name}.npz", allow_pickle=False, ids=ids, **contents)
        print(f"{name}.npz: {len(contents)} arrays")


if __name__ == "__main__":
    main()
