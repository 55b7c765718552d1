"""npgpt generate: continue a prompt."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import NpgptError, about
from .options import add_common, importing, note, open_model, read_file, text_or_ids, tune

if TYPE_CHECKING:
    from ..language_model import LanguageModel


Prompt: TypeAlias = tuple[list[int], str | list[int] | None]  # its ids, and what was given: a text, ids or nothing


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "npgpt generate [PROMPT | -] [option …]"
    parser.description = "Print a prompt and the text that the model writes after it, token by token."
    parser.epilog = 'example: npgpt generate "It is a truth universally" --temperature 0'
    argument = parser.add_argument
    argument("prompt", nargs="?", help="the text; - reads standard input (default: <|endoftext|> or bos_token_id)")
    argument("--ids", metavar="1,2,3", help="the prompt as token ids")
    argument("--prompts", metavar="FILE", help="continue each line of FILE; print a line of JSON for each")
    add_common(parser, "--model", "--n-head", "--activation")
    argument("--max-tokens", type=int, default=100, metavar="N", help="generate at most N tokens (default: 100)")
    argument("--temperature", type=float, default=0.8, metavar="T", help="of the softmax; 0 is greedy (default: 0.8)")
    argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens only; 0: from all")
    argument("--top-p", type=float, metavar="P", help="draw from the most likely tokens, up to a sum of P")
    argument("--min-p", type=float, metavar="P", help="drop tokens below P times the highest probability")
    argument("--repetition-penalty", type=float, metavar="R", help="above 1: tokens that have occurred are less likely")
    argument("--seed", type=int, metavar="S", help="same seed, same text (default: random; -v prints it)")
    argument("--samples", type=int, default=1, metavar="N", help="N continuations, seeds S, S + 1, … (default: 1)")
    argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    argument("--ignore-eos", action="store_true", help="do not end at <|endoftext|> or eos_token_id")
    add_common(parser, "--special")
    argument("--keep-last", action="store_true", help="cut the beginning of a prompt longer than the context")
    add_common(parser, "--dtype", "--threads")
    argument("--json", action="store_true", help="print one JSON object per sample at its end")
    argument("-v", "--verbose", action="store_true", help="print counts, times and the seed on stderr")


def run(options: argparse.Namespace) -> int:
    """Generate; see the help."""
    tuned = tune(options.threads)
    with importing():
        from ..text.sampling import Sampling

    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    sampling = Sampling(**{option.name: getattr(options, option.name) for option in fields(Sampling)})
    if options.samples > 1 and options.temperature == 0:
        note(f"--temperature 0 is greedy: the {options.samples} samples are the same text")
    model = open_model(options)
    for text in model.ends.notes:
        note(text)
    settings = {
        "max_tokens": options.max_tokens,
        "sampling": sampling,
        "seed": seed,
        "stop": options.stop,
        "ignore_eos": options.ignore_eos,
    }
    if options.prompts is None:
        prompt = _prompt(options, model)
        steps = model.steps(prompt[0], samples=options.samples, **settings)
        prompts = [prompt] * options.samples
    else:
        prompts = _lines(options, model)
        steps = model.steps_many([ids for ids, _ in prompts], **settings)
    samples = [
        _Sample(number, ids, _shown(model, ids, given), seed + number - 1)
        for number, (ids, given) in enumerate(prompts, 1)
    ]
    about = {"model": model.name, "dtype": str(model.parameters.wte.weight.dtype)}
    as_json = options.json or options.prompts is not None
    streamed = len(samples) == 1 and not as_json
    complete = 0  # number of samples printed so far
    started = time.perf_counter()
    for number, step in enumerate(steps):
        sample = samples[step.sample]
        if step.token_id is not None:
            sample.token_ids.append(step.token_id)
            sample.times.append(time.perf_counter() - started)
        piece = _spaced(step[:1]) if model.why_no_text else step.text
        sample.text += piece
        sample.finish = step.finish
        if streamed:
            print(piece if number else sample.prompt + piece, end="" if step.finish is None else "\n", flush=True)
        for ended in itertools.takewhile(lambda sample: sample.finish, samples[complete:]):
            complete += 1
            if as_json:
                print(json.dumps(about | ended.report()), flush=True)
            elif not streamed:
                title = f"--- sample {ended.number} of {len(samples)}, seed {ended.seed} ---"
                print(f"{title}\n{ended.prompt}{ended.text}", flush=True)

    if any(sample.finish == "context" for sample in samples):
        note(f"the context of {model.config.n_positions} tokens is full")
    if options.verbose:
        read = sum(len(ids) for ids, _ in (prompts if options.prompts is not None else prompts[:1]))
        note(f"{read} prompt tokens, {_counts(samples)}")
        note("; ".join(tuned))
    return 0


@dataclass
class _Sample:
    """One continuation: its number from 1, its prompt, and what has been generated so far."""

    number: int
    prompt_ids: list[int]
    prompt: str
    seed: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of each token, in seconds from the start
    finish: str | None = None

    def report(self) -> dict[str, Any]:
        """Return the sample as --json prints it."""
        return {
            "prompt": self.prompt,
            "prompt_ids": self.prompt_ids,
            "sample": self.number,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish": self.finish,
            "seed": self.seed,
            "seconds_to_first_token": self.times[0] if self.times else None,
            "tokens_per_second": _rate([self]),
        }


def _counts(samples: list[_Sample]) -> str:
    """Return the samples' token counts, why each ended, the seeds, and the speed, for -v."""
    counts = ", ".join(f"{len(sample.token_ids)} generated ({sample.finish})" for sample in samples)
    seeds = f"seed {samples[0].seed}" + (f" to {samples[-1].seed}" if len(samples) > 1 else "")
    first, rate = min((sample.times[0] for sample in samples if sample.times), default=None), _rate(samples)
    pace = f"{first:.3f} s to the first token" if first is not None else "no token"
    return f"{counts}, {seeds}; {pace}" + (f", then {rate:.1f} tokens/s" if rate is not None else "")


def _rate(samples: list[_Sample]) -> float | None:
    """Return tokens per second after each sample's first token, or None if there are none."""
    begun = [sample.times for sample in samples if sample.times]
    after = sum(len(times) - 1 for times in begun)
    return after / (max(times[-1] for times in begun) - begun[0][0]) if after else None


def _prompt(options: argparse.Namespace, model: LanguageModel) -> Prompt:
    """Return the prompt. Raises NpgptError if its ids do not fit the context."""
    given = text_or_ids(options.prompt, options.ids, "prompt", say=options.verbose)
    ids = given if isinstance(given, list) else model.encode_prompt(given or "", special=options.special)
    return _fitting(ids, "the prompt", options, model), given


def _lines(options: argparse.Namespace, model: LanguageModel) -> list[Prompt]:
    """Return the prompts in the lines of a file. Raises NpgptError, with the line's number."""
    if options.prompt is not None or options.ids is not None:
        raise NpgptError("give one prompt, as text or as --ids, or several with --prompts, not both")
    if options.samples != 1:
        raise NpgptError("--prompts draws one sample per prompt: repeat a line in the file instead of using --samples")
    lines = read_file(options.prompts, options.verbose).removesuffix("\n").split("\n")
    found: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        name = f"{'standard input' if options.prompts == '-' else options.prompts}: line {number}"
        text = line.removesuffix("\r")
        if not text:
            raise NpgptError(f"{name} is empty: remove it, since every line is a prompt")
        with about(name):
            ids = model.encode_prompt(text, special=options.special)
        found.append((_fitting(ids, f"{name}: the prompt", options, model), text))
    return found


def _fitting(ids: list[int], name: str, options: argparse.Namespace, model: LanguageModel) -> list[int]:
    """Return a prompt's ids, cut to the context if --keep-last is given. Raises NpgptError if they do not fit."""
    context = model.config.n_positions
    if len(ids) <= context:
        return ids
    if not options.keep_last:
        raise NpgptError(f"{name} has {len(ids)} tokens, the context holds {context}; --keep-last cuts its head")
    from ..text.generation import kept_prompt

    kept: list[int] = kept_prompt(ids, model.config, options.max_tokens).tolist()
    cut = len(ids) - len(kept)
    note(f"{name}'s first {cut} of {len(ids)} tokens are cut, {len(kept)} kept in the context of {context}")
    return kept


def _shown(model: LanguageModel, prompt_ids: list[int], given: str | list[int] | None) -> str:
    """Return the prompt to show: its ids as text, without what the tokenizer put before the text that was given.

    An incomplete character at the end is held back. A model without text shows ids.
    """
    from ..text.tokenizer import TextDecoder

    if given is None:
        return ""
    if model.why_no_text:
        return _spaced(prompt_ids)
    before = [] if isinstance(given, list) else list(model.tokenizer.before)
    own = prompt_ids[len(before) :] if prompt_ids[: len(before)] == before else prompt_ids
    text = TextDecoder(model.tokenizer, own).before
    return given if isinstance(given, str) and text == f" {given}" else text


def _spaced(token_ids: Iterable[int | None]) -> str:
    """Return the ids of a model without text, each followed by a space."""
    return "".join(f"{token_id} " for token_id in token_ids if token_id is not None)
