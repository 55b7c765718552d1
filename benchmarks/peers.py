"""Other programs that run GPT-2 on a CPU in float32, a class for each with the settings that proved fastest.

Only its own class imports a package, so that a missing one costs only that peer.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .workloads import Engine

Ids = list[int]


class Transformers:
    """GPT2LMHeadModel in a loop over its forward with a cache, at least as fast as its generate()."""

    def __init__(self, folder: Path, threads: int, attention: str = "sdpa", compiled: bool = False) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
        self.model = model.eval()
        self.config = self.model.config
        self.forward: Callable[..., Any] = self.model.forward
        self.cache: Callable[[int], Any] = lambda length: transformers.DynamicCache(config=self.config)
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # the benchmarks use more shapes than the default allows
            # packs a copy of the weights for every graph, too much for gpt2-xl; has no effect as an option of compile
            torch._inductor.config.freezing = (folder / "model.safetensors").stat().st_size < 2**31
            self.forward = torch.compile(self.forward)
            self.cache = lambda length: transformers.StaticCache(config=self.config, max_cache_len=length)

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]:
        """Return greedy ids."""
        import torch

        with torch.inference_mode():
            ids, drawn = torch.tensor(prompts), []
            cache = self.cache(len(prompts[0]) + new - 1)
            for _ in range(new):
                logits = self.forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1].argmax(dim=-1, keepdim=True)
                drawn.append(ids)
            found: list[Ids] = torch.cat(drawn, dim=1).tolist()
        return found

    def score(self, ids: Ids) -> list[float]:
        """Return log-probabilities."""
        import torch

        with torch.inference_mode():
            tokens = torch.tensor(ids)
            logits = self.forward(tokens[None], use_cache=False).logits[0, :-1]
            found: list[float] = (-torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")).tolist()
        return found


class LLMsFromScratch:
    """The package's GPTModelFast, without a cache.

    The cache of its kv_cache.gpt2 1.0.19 raises at the second token, where the mask has as many rows as keys.
    """

    LONGEST = 160  # tokens recomputed at each step; more would take minutes

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from llms_from_scratch.ch04 import GPTModelFast
        from safetensors.torch import load_file

        torch.set_num_threads(threads)
        config = json.loads((folder / "config.json").read_text())
        theirs = {
            "vocab_size": config["vocab_size"],
            "context_length": config["n_positions"],
            "emb_dim": config["n_embd"],
            "n_heads": config["n_head"],
            "n_layers": config["n_layer"],
            "drop_rate": 0.0,
            "qkv_bias": True,
        }
        with torch.device("meta"):
            self.model = GPTModelFast(theirs)
        names = {"wte": "tok_emb", "wpe": "pos_emb", "ln_f": "final_norm"}
        parts = {"ln_1": "norm1", "attn.c_attn": "att.qkv", "attn.c_proj": "att.proj", "ln_2": "norm2"}
        parts |= {"mlp.c_fc": "ff.layers.0", "mlp.c_proj": "ff.layers.2"}
        for layer in range(config["n_layer"]):
            names |= {f"h.{layer}.{ours}": f"trf_blocks.{layer}.{theirs}" for ours, theirs in parts.items()}
        state = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            module, _, kind = name.rpartition(".")
            transposed = module.startswith("h.") and tensor.ndim == 2
            state[f"{names[module]}.{kind}"] = tensor.T.contiguous() if transposed else tensor
        state["out_head.weight"] = state["tok_emb.weight"]
        self.model.load_state_dict(state, assign=True)
        self.model.eval()

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]:
        """Return greedy ids, from the engine's own loop."""
        import torch
        from llms_from_scratch.ch04 import generate_text_simple

        length = len(prompts[0])
        if new > 1 and len(prompts) * (length + new) > self.LONGEST:
            raise NotImplementedError("without a cache")
        with torch.inference_mode():
            ids = generate_text_simple(self.model, torch.tensor(prompts), new, self.model.pos_emb.num_embeddings)
            found: list[Ids] = ids[:, length:].tolist()
        return found

    def score(self, ids: Ids) -> list[float]:
        """Return log-probabilities."""
        import torch

        with torch.inference_mode():
            tokens = torch.tensor(ids)
            logits = self.model(tokens[None])[0, :-1]
            found: list[float] = (-torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")).tolist()
        return found


class OnnxRuntime:
    """ONNX Runtime, with keys and values in buffers that the graph updates in place."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.past = {node.name: node.shape for node in self.session.get_inputs() if ".past." in node.name}

    def binding(self, batch: int, capacity: int) -> Any:
        """Return a binding with empty keys and values."""
        from onnxruntime import OrtValue

        binding = self.session.io_binding()
        for name, (_, heads, _, width) in self.past.items():
            buffer = OrtValue.ortvalue_from_shape_and_type([batch, heads, capacity, width], np.float32)
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past", "present"), buffer)
        binding.bind_output("logits")
        return binding

    def logits(self, binding: Any, ids: NDArray[np.int64], past: int, first: int) -> NDArray[np.float32]:
        """Return the logits of positions from `first` on, [rows, vocabulary]."""
        batch, length = ids.shape
        total = past + length
        inputs = {"input_ids": ids, "position_ids": np.arange(past, total), "first": np.array([first])}
        inputs |= {"last": np.full(batch, total - 1, np.int32), "total": np.array(total, np.int32)}
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        self.session.run_with_iobinding(binding)
        found: NDArray[np.float32] = binding.get_outputs()[-1].numpy()  # it was bound last
        return found

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]:
        """Return greedy ids."""
        ids, drawn, past = np.array(prompts), [], 0
        binding = self.binding(len(prompts), len(prompts[0]) + new - 1)
        for _ in range(new):
            length = ids.shape[1]
            ids = self.logits(binding, ids, past, length - 1).argmax(axis=-1)[:, None]
            drawn.append(ids)
            past += length
        found: list[Ids] = np.concatenate(drawn, axis=1).tolist()
        return found

    def score(self, ids: Ids) -> list[float]:
        """Return log-probabilities."""
        return log_probabilities(self.logits(self.binding(1, len(ids)), np.array([ids]), 0, 0), ids)


class OpenVino:
    """OpenVINO GenAI's pipeline with paged attention, which was faster than its SDPA backend."""

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino_genai

        self.folder = folder
        self.options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # or the second prefill of a prompt costs nothing
        scheduler.dynamic_split_fuse = False
        scheduler.max_num_batched_tokens = 2**14  # a prompt in one piece
        self.pipeline = openvino_genai.LLMPipeline(
            folder, "CPU", ATTENTION_BACKEND="PA", scheduler_config=scheduler, **self.options
        )

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]:
        """Return greedy ids."""
        import openvino
        import openvino_genai

        ids = np.array(prompts)
        # without a tokenizer, the end token to ignore must be named
        settings = openvino_genai.GenerationConfig(
            max_new_tokens=new, ignore_eos=True, eos_token_id=0, stop_token_ids={0}, do_sample=False
        )
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return [list(row) for row in self.pipeline.generate(inputs, settings).tokens]

    @cached_property
    def scorer(self) -> Any:
        """The same graph in plain OpenVINO, because GenAI cannot score; opened late: it holds the weights again."""
        import openvino

        return openvino.Core().compile_model(self.folder / "openvino_model.xml", "CPU", self.options)

    def score(self, ids: Ids) -> list[float]:
        """Return log-probabilities."""
        request = self.scorer.create_infer_request()
        row = np.array([ids])
        inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]}
        request.infer(inputs | {"beam_idx": np.zeros(1, np.int32)})
        return log_probabilities(request.get_tensor("logits").data[0], ids)


class CTranslate2:
    """CTranslate2's generator with its default SGEMM, which is twice as fast as MKL on an AMD EPYC."""

    def __init__(self, folder: Path, threads: int) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type="float32", inter_threads=1, intra_threads=threads
        )

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]:
        """Return greedy ids."""
        results = self.generator.generate_batch(
            [list(map(str, prompt)) for prompt in prompts],
            max_length=new,
            end_token=[],
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    def score(self, ids: Ids) -> list[float]:
        """Return log-probabilities."""
        found: list[float] = self.generator.score_batch([list(map(str, ids))], max_input_length=0)[0].log_probs
        return found


class LlamaCpp:
    """llama.cpp through its C functions, because llama-cpp-python's class runs one sequence at a time."""

    def __init__(self, folder: Path, threads: int) -> None:
        import llama_cpp

        self.threads = threads
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            bytes(folder / "model.gguf"), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot open {folder}")
        self.positions = llama_cpp.llama_model_n_ctx_train(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts: dict[int, Any] = {}
        self.context(1)

    def context(self, sequences: int) -> Any:
        """Return a context for that many sequences, opened at first use because it reserves all their positions."""
        import llama_cpp

        if sequences not in self.contexts:
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx = parameters.n_batch = sequences * self.positions
            parameters.n_seq_max = sequences
            parameters.n_threads = parameters.n_threads_batch = self.threads
            parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            self.contexts[sequences] = llama_cpp.llama_init_from_model(self.model, parameters)
        return self.contexts[sequences]

    def logits(self, context: Any, rows: list[Ids], past: int, every: bool = False) -> NDArray[np.float32]:
        """Return logits [positions, vocabulary] of every position or each row's last, valid until the next call."""
        import llama_cpp

        length = len(rows[0])
        batch = llama_cpp.llama_batch_init(len(rows) * length, 0, 1)
        batch.n_tokens = len(rows) * length
        for at in range(batch.n_tokens):
            row, column = divmod(at, length)
            batch.token[at] = rows[row][column]
            batch.pos[at] = past + column
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = row
            batch.logits[at] = every or column == length - 1
        failed = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")
        count = len(rows) * (length if every else 1)
        values = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(values, (count, self.vocabulary))

    def empty(self, sequences: int) -> Any:
        """Return a context with an empty cache."""
        import llama_cpp

        context = self.context(sequences)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        return context

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]:
        """Return greedy ids."""
        context, rows, past = self.empty(len(prompts)), prompts, 0
        drawn: list[Ids] = []
        for _ in range(new):
            drawn.append(self.logits(context, rows, past).argmax(axis=-1).tolist())
            past += len(rows[0])
            rows = [[token] for token in drawn[-1]]
        return [list(row) for row in zip(*drawn, strict=True)]

    def score(self, ids: Ids) -> list[float]:
        """Return log-probabilities."""
        return log_probabilities(self.logits(self.empty(1), [ids], 0, every=True), ids)


def log_probabilities(logits: NDArray[np.floating[Any]], ids: Ids) -> list[float]:
    """Return log-probabilities of ids[1:] from logits, a block at a time because one row of logits takes 0.2 MB."""
    scores: list[float] = []
    for start in range(0, len(ids) - 1, 16):
        chosen = np.array(ids[start + 1 : start + 17])[:, None]
        part = logits[start : start + len(chosen)]
        part = part - part.max(axis=-1, keepdims=True)
        taken = np.take_along_axis(part, chosen, axis=-1)[:, 0]
        scores += (taken - np.log(np.exp(part, out=part).sum(axis=-1))).tolist()
    return scores


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "transformers eager": partial(Transformers, attention="eager"),
    "transformers sdpa": Transformers,
    "transformers torch.compile": partial(Transformers, compiled=True),
    "onnxruntime": OnnxRuntime,
    "OpenVINO GenAI": OpenVino,
    "CTranslate2": CTranslate2,
    "llama.cpp": LlamaCpp,
    "LLMs-from-scratch": LLMsFromScratch,
    "onnxruntime int8": OnnxRuntime,
    "llama.cpp Q8_0": LlamaCpp,
}
INT8 = frozenset({"onnxruntime int8", "llama.cpp Q8_0"})
