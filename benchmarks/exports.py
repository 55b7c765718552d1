"""Export the weights to the format each peer opens, once, beside the source.

Where a peer's own tools export no good graph (keys and values updated in place, logits of the last position only), the
graph is built here from the peer's fused operators. The weights never change.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npgpt.checkpoints import safetensors

Weights = dict[str, NDArray[np.float32]]


def export(name: str, source: Path) -> Path:
    """Return the folder that engine `name` opens, exported from `source`; `source` itself if the engine reads it.

    `source` has Hugging Face's names. The export is written under a temporary name and renamed when complete.
    """
    if name not in FORMS:
        return source
    form, write = FORMS[name]
    folder = source.with_name(f"{source.name}.{form}")
    if not folder.is_dir():
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        temporary.mkdir()
        try:
            write(source, temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def misaligned(source: Path, folder: Path) -> None:
    """Copy the file with its data at an address that is not a multiple of 4, as in the hub's own gpt2 file."""
    with open(source / "model.safetensors", "rb") as old, open(folder / "model.safetensors", "wb") as new:
        header = old.read(int.from_bytes(old.read(8), "little"))
        header += b" " * (3 - len(header) % 4)  # the data begin 8 bytes after the header's end
        new.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(old, new)
    shutil.copy(source / "config.json", folder)


def onnx(source: Path, folder: Path) -> None:
    """Write a graph of ONNX Runtime's fused operators, with model.safetensors itself as external data.

    GroupQueryAttention, as in ONNX Runtime's own exporter for language models, updates keys and values in place. Rows
    are flat, [batch * tokens, width], so that Gemm adds every bias.
    """
    from onnx import TensorProto, helper, save

    config, weights = config_of(source), safetensors.read(source / "model.safetensors").tensors
    shutil.copy(source / "model.safetensors", folder)  # onnx rejects a link
    width, heads, epsilon = config["n_embd"], config["n_head"], config["layer_norm_epsilon"]
    tensors = [TensorProto(name=name, data_type=TensorProto.FLOAT, dims=t.shape) for name, t in weights.items()]
    for tensor in tensors:
        tensor.data_location = TensorProto.EXTERNAL
        at = weights[tensor.name]
        for key, value in (("location", "model.safetensors"), ("offset", at.begin), ("length", at.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
    constants = {"rows": [-1, width], "width": [width], "rest": [-1], "end": [2**62], "axis": [1]}
    tensors += [helper.make_tensor(key, TensorProto.INT64, [len(ids)], ids) for key, ids in constants.items()]
    nodes = []

    def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> str:
        """Append a node and return its last output's name. Names are separated by spaces; _ leaves one out."""
        fused = operator in ("GroupQueryAttention", "SkipLayerNormalization", "FastGelu")
        names = [["" if name == "_" else name for name in text.split()] for text in (inputs, outputs)]
        nodes.append(helper.make_node(operator, *names, domain="com.microsoft" if fused else "", **attributes))
        return names[1][-1]

    node("Shape", "input_ids", "shape")
    node("Concat", "shape rest", "packed", axis=0)
    node("Concat", "shape width", "hidden", axis=0)
    node("Gather", "wte.weight input_ids", "tokens")
    node("Gather", "wpe.weight position_ids", "positions")
    node("Add", "tokens positions", "embedding")
    x = node("Reshape", "embedding rows", "x")
    node("LayerNormalization", "x h.0.ln_1.weight h.0.ln_1.bias", "h.0.norm", epsilon=epsilon)
    inputs, outputs = [], []
    for layer in range(config["n_layer"]):
        h = f"h.{layer}"
        after = f"h.{layer + 1}.ln_1" if layer + 1 < config["n_layer"] else "ln_f"
        following = f"h.{layer + 1}.norm"
        node("Gemm", f"{h}.norm {h}.attn.c_attn.weight {h}.attn.c_attn.bias", f"{h}.flat_qkv")
        node("Reshape", f"{h}.flat_qkv packed", f"{h}.qkv")
        attention = (
            f"{h}.qkv _ _ {h}.past.key {h}.past.value last total",
            f"{h}.mixed {h}.present.key {h}.present.value",
        )
        node("GroupQueryAttention", *attention, num_heads=heads, kv_num_heads=heads)
        node("Reshape", f"{h}.mixed rows", f"{h}.merged")
        node("MatMul", f"{h}.merged {h}.attn.c_proj.weight", f"{h}.attended")
        skip = f"{h}.attended {x} {h}.ln_2.weight {h}.ln_2.bias {h}.attn.c_proj.bias"
        x = node("SkipLayerNormalization", skip, f"{h}.norm_2 _ _ {h}.x", epsilon=epsilon)
        node("MatMul", f"{h}.norm_2 {h}.mlp.c_fc.weight", f"{h}.wide")
        node("FastGelu", f"{h}.wide {h}.mlp.c_fc.bias", f"{h}.act")
        node("MatMul", f"{h}.act {h}.mlp.c_proj.weight", f"{h}.narrow")
        skip = f"{h}.narrow {x} {after}.weight {after}.bias {h}.mlp.c_proj.bias"
        x = node("SkipLayerNormalization", skip, f"{following} _ _ {h}.y", epsilon=epsilon)
        for kind in ("key", "value"):
            shape = ["batch", heads, "capacity", width // heads]
            inputs.append(helper.make_tensor_value_info(f"{h}.past.{kind}", TensorProto.FLOAT, shape))
            outputs.append(helper.make_tensor_value_info(f"{h}.present.{kind}", TensorProto.FLOAT, shape))
    node("Reshape", f"{following} hidden", "normed")
    node("Slice", "normed first end axis", "kept")
    node("Reshape", "kept rows", "kept_rows")
    node("Gemm", "kept_rows wte.weight", "logits", transB=1)
    whole = {"input_ids": ["batch", "tokens"], "position_ids": ["tokens"], "first": [1]}
    short = {"last": ["batch"], "total": []}
    inputs += [helper.make_tensor_value_info(key, TensorProto.INT64, shape) for key, shape in whole.items()]
    inputs += [helper.make_tensor_value_info(key, TensorProto.INT32, shape) for key, shape in short.items()]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["kept", config["vocab_size"]])
    graph = helper.make_graph(nodes, "gpt2", inputs, [logits, *outputs], tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")


def onnx_int8(source: Path, folder: Path) -> None:
    """Write that graph after onnxruntime's dynamic quantisation."""
    from onnx import TensorProto
    from onnxruntime.quantization import quantize_dynamic

    graph = export("onnxruntime", source) / "model.onnx"
    options = {"DefaultTensorType": TensorProto.FLOAT}
    quantize_dynamic(
        graph, folder / "model.onnx", per_channel=True, use_external_data_format=True, extra_options=options
    )


def openvino(source: Path, folder: Path) -> None:
    """Write a stateful graph of the kind that optimum-intel exports and OpenVINO GenAI expects."""
    import openvino as ov
    from openvino import opset13 as op

    config, weights = config_of(source), arrays_of(source)
    width, heads = config["n_embd"], config["n_head"]
    split_shape = op.constant([0, 0, heads, width // heads])
    swap = op.constant([0, 2, 1, 3])

    def norm(x: Any, name: str) -> Any:
        x = op.mvn(x, op.constant([-1]), True, config["layer_norm_epsilon"], "inside_sqrt")
        return op.add(op.multiply(x, op.constant(weights[f"{name}.weight"])), op.constant(weights[f"{name}.bias"]))

    def linear(x: Any, name: str) -> Any:
        weight = op.constant(np.ascontiguousarray(weights[f"{name}.weight"].T))
        return op.add(op.matmul(x, weight, False, True), op.constant(weights[f"{name}.bias"]))

    inputs = {}
    for name, rank, dtype in (
        ("input_ids", 2, ov.Type.i64),
        ("attention_mask", 2, ov.Type.i64),
        ("position_ids", 2, ov.Type.i64),
        ("beam_idx", 1, ov.Type.i32),
    ):
        inputs[name] = op.parameter([-1] * rank, dtype, name)
        inputs[name].set_friendly_name(name)  # GenAI finds them by this name
        inputs[name].output(0).set_names({name})
    zero, wte = op.constant(0), op.constant(weights["wte.weight"])
    x = op.add(
        op.gather(wte, inputs["input_ids"], zero),
        op.gather(op.constant(weights["wpe.weight"]), inputs["position_ids"], zero),
    )
    batch = op.gather(op.shape_of(inputs["input_ids"]), op.constant([0]), zero)
    length = op.gather(op.shape_of(inputs["attention_mask"]), op.constant(1), zero)
    nothing = op.concat([batch, op.constant([heads, 0, width // heads])], 0)
    nothing = op.broadcast(op.constant(np.float32(0)), nothing)
    keys = op.range(zero, length, op.constant(1), "i64")
    visible = op.less_equal(keys, op.unsqueeze(inputs["position_ids"], op.constant([1, 3])))
    sinks = []
    for layer in range(config["n_layer"]):
        h = f"h.{layer}."
        qkv = op.split(linear(norm(x, h + "ln_1"), h + "attn.c_attn"), op.constant(2), 3).outputs()
        query, *new = (op.transpose(op.reshape(part, split_shape, True), swap) for part in qkv)
        full = []
        for kind, part in zip(("key", "value"), new, strict=True):
            info = ov.op.util.VariableInfo()
            info.data_shape = ov.PartialShape([-1, heads, -1, width // heads])
            info.data_type = ov.Type.f32
            info.variable_id = f"past_key_values.{layer}.{kind}present.{layer}.{kind}"
            variable = ov.op.util.Variable(info)
            past = op.gather(ov.op.read_value(nothing, variable), inputs["beam_idx"], zero)
            full.append(op.concat([past, part], 2))
            sinks.append(ov.op.assign(full[-1], variable))
        mixed = op.transpose(op.scaled_dot_product_attention(query, *full, visible), swap)
        x = op.add(x, linear(op.reshape(mixed, op.constant([0, 0, width]), True), h + "attn.c_proj"))
        wide = op.gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc"), "tanh")
        x = op.add(x, linear(wide, h + "mlp.c_proj"))
    logits = op.matmul(norm(x, "ln_f"), wte, False, True)
    logits.output(0).set_names({"logits"})
    model = ov.Model([op.result(logits)], sinks, list(inputs.values()), "gpt2")
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    shutil.copy(source / "config.json", folder)


def ctranslate2(source: Path, folder: Path) -> None:
    """Write CTranslate2's format; its tokens are the ids in decimal."""
    from ctranslate2.specs import common_spec, transformer_spec

    config, weights = config_of(source), arrays_of(source)
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["n_layer"], config["n_head"], activation=common_spec.Activation.GELUTanh
    )

    def norm(part: Any, name: str) -> None:
        part.gamma, part.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def linear(part: Any, name: str) -> None:
        part.weight = np.ascontiguousarray(weights[f"{name}.weight"].T)
        part.bias = weights[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["wte.weight"]
    decoder.position_encodings.encodings = weights["wpe.weight"]
    norm(decoder.layer_norm, "ln_f")
    for layer, block in enumerate(decoder.layer):
        h = f"h.{layer}."
        norm(block.self_attention.layer_norm, h + "ln_1")
        linear(block.self_attention.linear[0], h + "attn.c_attn")
        linear(block.self_attention.linear[1], h + "attn.c_proj")
        norm(block.ffn.layer_norm, h + "ln_2")
        linear(block.ffn.linear_0, h + "mlp.c_fc")
        linear(block.ffn.linear_1, h + "mlp.c_proj")
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "0"
    spec.config.layer_norm_epsilon = config["layer_norm_epsilon"]
    spec.register_vocabulary([str(token) for token in range(config["vocab_size"])])
    spec.validate()
    spec.optimize(quantization=None)
    spec.save(str(folder))


def llama(source: Path, folder: Path) -> None:
    """Write float32 GGUF without a vocabulary, tensor by tensor."""
    from gguf import GGUFWriter, LlamaFileType

    config, weights = config_of(source), arrays_of(source)
    writer = GGUFWriter(folder / "model.gguf", "gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    parts = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm"}
    parts |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for layer in range(config["n_layer"]):
        names |= {f"h.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}

    def laid_out(name: str) -> NDArray[np.float32]:
        return weights[name].T if name.startswith("h.") and weights[name].ndim == 2 else weights[name]

    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        writer.add_tensor_info(f"{names[module]}.{kind}", laid_out(name).shape, weight.dtype, weight.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in weights:
        writer.write_tensor_data(np.ascontiguousarray(laid_out(name)))
    writer.close()


def llama_int8(source: Path, folder: Path) -> None:
    """Write that file after llama.cpp's own quantisation to Q8_0."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    whole, small = export("llama.cpp", source) / "model.gguf", folder / "model.gguf"
    if llama_cpp.llama_model_quantize(bytes(whole), bytes(small), parameters):
        raise RuntimeError(f"llama.cpp could not quantise {whole}")


def config_of(source: Path) -> dict[str, Any]:
    """Return config.json, which may only hold settings that all peers support."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    expected: dict[str, object] = {
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    expected["activation_function"] = "gelu_new"
    assert {key: config[key] for key in expected} == expected, config
    return config


def arrays_of(source: Path) -> Weights:
    """Return every weight as a view of the mapped file."""
    return {name: tensor.stored() for name, tensor in safetensors.read(source / "model.safetensors").tensors.items()}


FORMS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "npgpt, misaligned file": ("misaligned", misaligned),
    "onnxruntime": ("onnx", onnx),
    "onnxruntime int8": ("onnx-int8", onnx_int8),
    "OpenVINO GenAI": ("openvino", openvino),
    "CTranslate2": ("ctranslate2", ctranslate2),
    "llama.cpp": ("gguf", llama),
    "llama.cpp Q8_0": ("gguf-q8_0", llama_int8),
}
