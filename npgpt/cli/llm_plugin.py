"""A plugin for the command llm (https://llm.datasette.io): llm -m npgpt-austen "It is a truth".

Only llm imports this module, through the entry point that setup.cfg declares. GPT-2 continues a text: the turns of a
conversation, prompts and responses, are joined to one text, and a system prompt is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import llm
from pydantic import Field

from ..errors import NpgptError
from ..process import tune_process


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """Register every model that npgpt list shows as npgpt-NAME."""
    from ..checkpoints.places import names  # reads no weights and imports no NumPy

    for name in names():
        register(Npgpt(name))


class Npgpt(llm.Model):
    """A model of npgpt, loaded with the first prompt."""

    can_stream = True

    class Options(llm.Options):
        """The options of npgpt generate, with its defaults."""

        max_tokens: int = Field(100, description="tokens to generate at most")
        temperature: float = Field(0.8, description="0 takes the most likely token")
        top_k: int | None = Field(None, description="draw from the k most likely tokens")
        top_p: float | None = Field(None, description="draw from the most likely tokens that together have p")
        min_p: float | None = Field(None, description="draw from tokens of at least p times the largest probability")
        repetition_penalty: float | None = Field(None, description="above 1: repeat less")
        seed: int | None = Field(None, description="the same seed gives the same text")
        stop: str | None = Field(None, description="text that ends the response, and is not part of it")
        keep_last: bool = Field(False, description="drop the beginning of a text that exceeds the context")

    def __init__(self, name: str) -> None:
        self.name = name
        self.model_id = f"npgpt-{name}"

    @cached_property
    def language_model(self) -> Any:
        """The loaded model."""
        tune_process()
        from ..language_model import load

        return load(self.name)

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Iterator[str]:
        """Yield the continuation of the conversation so far. Raises llm.ModelError if npgpt refuses."""
        if any(message.role == "system" for message in prompt.messages):
            raise llm.ModelError(f"{self.model_id} continues a text and has no system prompt: put it into the prompt")
        parts = [part for message in prompt.messages for part in message.parts]
        if not all(hasattr(part, "text") for part in parts):
            raise llm.ModelError(f"{self.model_id} reads text only: leave out attachments and tools")
        text = "".join(part.text for part in parts)
        options = {name: value for name, value in prompt.options.model_dump().items() if value is not None}
        try:
            yield from self.language_model.generate(text, **options)
        except NpgptError as error:
            raise llm.ModelError(str(error)) from None
