"""Draw the losses of a training: python examples/curve.py weights/mine.npz curve.svg

Dots are the held-out loss; the line is the training loss, averaged over a hundredth of the steps. The picture is light
or dark as the page is.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 720, 360, 52, 40, 16  # pixels; EDGE is the space above and to the right
STYLE = """
text { fill: #555; font: 13px sans-serif } path { fill: none; stroke: #8fb4cf; stroke-width: 2 }
circle, .held { fill: #1b6ca8 } line { stroke: #ddd } rect { fill: #fff }
@media (prefers-color-scheme: dark) {
  text { fill: #bbb } path { stroke: #3f6d8c } circle, .held { fill: #7cc4f5 }
  line { stroke: #3a3a3a } rect { fill: #161616 }
}"""

Points = list[tuple[float, float]]


def read(path: Path) -> tuple[Points, Points]:
    """Return (step, loss) of training, averaged over a hundredth of the steps, and of the held-out text."""
    with np.load(path) as run:
        losses, held_out = run["losses"], run["held_out"]
    share = -(-len(losses) // 100)
    groups = [losses[start : start + share] for start in range(0, len(losses), share)]
    training = [(start * share + (len(group) + 1) / 2, float(group.mean())) for start, group in enumerate(groups)]
    return training, [(step, loss) for step, loss in held_out.tolist()]


def svg(training: Points, held_out: Points) -> str:
    """Return the picture."""
    losses = [loss for _, loss in training + held_out]
    low, high, last = int(min(losses)), int(max(losses)) + 1, max(step for step, _ in training + held_out)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + step / last * (WIDTH - LEFT - EDGE)
        return x, EDGE + (high - loss) / (high - low) * (HEIGHT - BOTTOM - EDGE)

    def body() -> Iterator[str]:
        for loss in range(low, high + 1):
            x, y = place(0, loss)
            yield f'<line x1="{x:.0f}" y1="{y:.1f}" x2="{WIDTH - EDGE}" y2="{y:.1f}"/>'
            yield f'<text x="{x - 8:.0f}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>'
        for part in range(5):
            x, y = place(last * part / 4, low)
            anchor = ("start", "middle", "middle", "middle", "end")[part]
            yield f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="{anchor}">{round(last * part / 4):,}</text>'
        points = " L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in training))
        yield f'<path d="M{points}"/>'
        for x, y in (place(*point) for point in held_out):
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        final = f": {held_out[-1][1]:.3f} at the end" if held_out else ""
        yield f'<text class="held" x="{WIDTH - EDGE - 8}" y="{EDGE + 22}" text-anchor="end">● held out{final}</text>'
        yield f'<text x="{WIDTH - EDGE - 8}" y="{EDGE + 42}" text-anchor="end">— training, with its masks</text>'

    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
    title = "<title>Loss in nats a token by step</title>"
    background = '<rect width="100%" height="100%" rx="6"/>'
    return "\n".join([f'{head}role="img">', title, f"<style>{STYLE}</style>", background, *body(), "</svg>", ""])


def main() -> int:
    """Draw; return 2 after a mistake, which one line explains."""
    if len(sys.argv) != 3:
        print("curve.py: error: give the run, such as weights/mine.npz, and the picture's name", file=sys.stderr)
        return 2
    source, target = map(Path, sys.argv[1:])
    try:
        target.write_text(svg(*read(source)), "utf-8")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        print(f"curve.py: error: {source}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
