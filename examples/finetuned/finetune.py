"""Fine-tune a GPT-2 on a text with PyTorch and transformers:

    python finetune.py START TEXT OUTPUT

START is a model folder, such as one that `npgpt convert` writes. OUTPUT becomes the folder that save_pretrained writes.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2LMHeadModel

import npgpt

STEPS = 20


def main() -> None:
    """Train on the whole text in every step, which is enough for a text of some lines."""
    start, text, output = map(Path, sys.argv[1:])
    tokenizer = npgpt.load(start).tokenizer
    token_ids = torch.tensor([tokenizer.encode(text.read_text("utf-8"))])
    model = GPT2LMHeadModel.from_pretrained(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.save_pretrained(output)
    shutil.copy(start / "vocab.tiktoken", output)  # with a tokenizer of transformers: tokenizer.save_pretrained(output)
    with torch.no_grad():
        logits = model(token_ids).logits
    np.savez(output / "logits.npz", token_ids=token_ids.numpy(), logits=logits.numpy())


main()
