"""The language model as an ONNX graph: what model/model_lm.py computes, a node a line.

It is written by hand, not traced. onnxruntime has one operator for attention and its cache
(GroupQueryAttention), one for rotary embedding, one for a sum and the norm behind it. On a CPU they
answer faster than the dozens of nodes that a trace makes of the same lines.
"""

import onnx
import torch
from onnx import TensorProto

from inference.onnx_files import KINDS
from model.model_lm import MiniMindLM, RMSNorm
from scripts.export.onnx_builder import ORT, GraphBuilder

# Is added to the scores of padding: softmax then gives it nothing.
MASKED = -1e9


def build_decoder(model: MiniMindLM, dtype: str) -> onnx.ModelProto:
    """The layers and the output head, with a cache of keys and values.

    Inputs: inputs_embeds float[B, T, dim] of the new tokens; attention_mask int64[B, S], 0 at
    padding, cached tokens included; position_ids int64[B, T], which do not count padding;
    past_key_values.N.key and .value float[B, n_kv_heads, S - T, head_dim].
    Outputs: logits float[B, T, vocab_size]; present.N.key and .value, T tokens longer.
    A batch can start together, and go on together by one token; only a single row by several.

    Args:
        model: in float32.
        dtype: of the weights: float32, int8 or int4.
    """
    graph = GraphBuilder(dtype)
    declare(graph, model)
    prepare_attention(graph, model)

    # `branch` is what a block adds to `hidden`: the next norm is over the sum of both.
    hidden, branch = "inputs_embeds", None
    for number in range(model.config.n_layers):
        hidden, branch = add_block(graph, model, number, hidden, branch)
    normed, _ = add_norm(graph, "norm", model.norm, hidden, branch)
    graph.linear(normed, "output.weight", model.output.weight, output="logits")
    return graph.build()


def declare(graph: GraphBuilder, model: MiniMindLM) -> None:
    """Say what goes in and what comes out, by the names that transformers.js asks for."""
    config, floats, longs = model.config, TensorProto.FLOAT, TensorProto.INT64
    batch, past, total = "batch_size", "past_sequence_length", "total_sequence_length"
    new = [batch, "sequence_length"]
    graph.add_input("inputs_embeds", floats, [*new, config.dim])
    graph.add_input("attention_mask", longs, [batch, total])
    graph.add_input("position_ids", longs, new)
    graph.add_output("logits", floats, [*new, config.vocab_size])
    n_heads, head_dim = config.n_kv_heads, config.head_dim
    for number in range(config.n_layers):
        for kind in KINDS:
            cached, grown = f"past_key_values.{number}.{kind}", f"present.{number}.{kind}"
            graph.add_input(cached, floats, [batch, n_heads, past, head_dim])
            graph.add_output(grown, floats, [batch, n_heads, total, head_dim])


def prepare_attention(graph: GraphBuilder, model: MiniMindLM) -> None:
    """Add what all layers need: the tensors split, cos, sin, length, last and bias."""
    # split: widths of queries, keys, values. cos, sin: float[max_seq_len, head_dim / 2]
    attention = model.layers[0].attention
    widths = [part.out_features for part in (attention.wq, attention.wk, attention.wv)]
    graph.constant("split", torch.tensor(widths))
    cos, sin = model.rope.unbind(-1)
    graph.constant("cos", cos)
    graph.constant("sin", sin)

    # length: int32[], S. last: int32[B], S - 1
    one = graph.constant("one", torch.tensor(1))
    n_rows = graph.add("Shape", "attention_mask", end=1)
    n_tokens = graph.add("Gather", graph.add("Shape", "attention_mask"), one)
    graph.add("Cast", n_tokens, to=TensorProto.INT32, outputs="length")
    last = graph.add("Cast", graph.add("Sub", n_tokens, one), to=TensorProto.INT32)
    graph.add("Expand", last, n_rows, outputs="last")

    # bias: float[B, 1, T, S], MASKED for padding, else 0
    is_text = graph.add("Cast", "attention_mask", to=TensorProto.BOOL)
    zero = graph.constant("zero", torch.tensor(0.0))
    masked = graph.constant("masked", torch.tensor(MASKED))
    bias = graph.add("Where", is_text, zero, masked)  # (B, S)
    bias = graph.add("Unsqueeze", bias, graph.constant("axes", torch.tensor([1, 2])))
    ones = graph.constant("ones", torch.tensor([1]))
    n_new = graph.add("Shape", "inputs_embeds", start=1, end=2)
    shape = graph.add("Concat", ones, ones, n_new, ones, axis=0)  # 1, 1, T, 1
    graph.add("Expand", bias, shape, outputs="bias")


def add_block(
    graph: GraphBuilder, model: MiniMindLM, number: int, hidden: str, branch: str | None
) -> tuple[str, str]:
    """Attention, then feed-forward, as in MiniMindBlock.

    Args:
        graph: is added to.
        model: has the weights.
        number: of the block.
        hidden, branch: what came in, and what the block before adds to it; see `add_norm`.

    Returns (hidden, branch), the same for the next block.
    """
    config, block, name = model.config, model.layers[number], f"layers.{number}"
    attention, feed_forward = block.attention, block.feed_forward

    # queries, keys and values: one product instead of three
    normed, hidden = add_norm(graph, f"{name}.attention_norm", block.attention_norm, hidden, branch)
    wqkv = torch.cat((attention.wq.weight, attention.wk.weight, attention.wv.weight))
    qkv = graph.linear(normed, f"{name}.attention.wqkv.weight", wqkv)
    parts = [f"{name}.{part}" for part in ("queries", "keys", "values")]
    graph.add("Split", qkv, "split", axis=-1, outputs=parts)

    # rotate interleaved pairs (x0, x1), (x2, x3) ..., then attend
    queries, keys = (
        graph.add(
            f"{ORT}.RotaryEmbedding",
            *(part, "position_ids", "cos", "sin"),
            num_heads=n_heads,
            interleaved=1,
        )
        for part, n_heads in zip(parts, (config.n_heads, config.n_kv_heads))
    )
    mixed = graph.add(
        f"{ORT}.GroupQueryAttention",
        *(queries, keys, parts[2]),
        *(f"past_key_values.{number}.{kind}" for kind in KINDS),
        *("last", "length", "", "", "", "bias"),
        outputs=[f"{name}.mixed", *(f"present.{number}.{kind}" for kind in KINDS)],
        num_heads=config.n_heads,
        kv_num_heads=config.n_kv_heads,
    )
    branch = graph.linear(mixed, f"{name}.attention.wo.weight", attention.wo.weight)

    # feed-forward; QuickGelu with alpha 1 is silu
    normed, hidden = add_norm(graph, f"{name}.ffn_norm", block.ffn_norm, hidden, branch)
    w1, w2, w3 = (
        (f"{name}.feed_forward.{part}.weight", getattr(feed_forward, part).weight)
        for part in ("w1", "w2", "w3")
    )
    gate = graph.add(f"{ORT}.QuickGelu", graph.linear(normed, *w1), alpha=1.0)
    gated = graph.add("Mul", gate, graph.linear(normed, *w3))
    return hidden, graph.linear(gated, *w2)


def add_norm(
    graph: GraphBuilder, name: str, norm: RMSNorm, hidden: str, branch: str | None
) -> tuple[str, str]:
    """RMSNorm of hidden + branch. Returns (what it gives, the sum)."""
    weight = graph.constant(f"{name}.weight", norm.weight)
    if branch is None:
        normed = graph.add("SimplifiedLayerNormalization", hidden, weight, epsilon=norm.eps)
        return normed, hidden
    outputs = [f"{name}_out", "", "", f"{name}_sum"]
    graph.add(
        f"{ORT}.SkipSimplifiedLayerNormalization",
        *(hidden, branch, weight),
        outputs=outputs,
        epsilon=norm.eps,
    )
    return outputs[0], outputs[3]
