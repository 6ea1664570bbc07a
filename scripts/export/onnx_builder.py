"""An ONNX graph, written node by node; a linear layer in it has weights of any dtype."""

import onnx
import torch
from onnx import helper, numpy_helper

# Operators of onnxruntime itself need it in front of their name.
ORT = "com.microsoft"
# Opset 18 and format 10 are read by all onnxruntimes since 2024, in browsers too.
OPSET, FORMAT = 18, 10
# Inputs of a linear layer that share a scale in int4.
BLOCK = 32
# What divides by a scale needs one, also where all weights are 0.
LEAST_SCALE = 1e-12


class GraphBuilder:
    """Nodes and weights in the order they are added; a tensor is spoken of by its name.

    Args:
        dtype: of the weights of linear layers: float32, int8 or int4.
    """

    def __init__(self, dtype: str = "float32"):
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def add(self, op: str, *inputs: str, outputs: str | list[str] = "", **attributes) -> str:
        """Add a node.

        Args:
            op: its operator; "com.microsoft.NAME" for one of onnxruntime.
            inputs: names of tensors; "" for an input that is left out.
            outputs: their names; a new one if not given.
            attributes: of the operator.

        Returns the name of its first output.
        """
        domain, _, op = op.rpartition(".")
        outputs = outputs or f"{op}_{len(self.nodes)}"
        outputs = [outputs] if isinstance(outputs, str) else outputs
        node = helper.make_node(op, inputs, outputs, outputs[0], domain=domain, **attributes)
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, tensor: torch.Tensor) -> str:
        """Add a tensor that the file holds; returns its name."""
        array = tensor.detach().contiguous().numpy()
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def add_input(self, name: str, dtype: int, shape: list[int | str]) -> None:
        """Say that a tensor comes in.

        `dtype` is a number of onnx.TensorProto; a name in `shape` stands for any size.
        """
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def add_output(self, name: str, dtype: int, shape: list[int | str]) -> None:
        """Say that a tensor goes out, see `add_input`."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def linear(self, x: str, name: str, weight: torch.Tensor, output: str = "") -> str:
        """x @ weight.T

        Args:
            x: float[..., in].
            name: of the weight.
            weight: float[out, in].
            output: name of the result, float[..., out].
        """
        if self.dtype == "int4" and weight.shape[1] % BLOCK == 0:
            packed, scale = quantize_int4(weight)
            return self.add(
                f"{ORT}.MatMulNBits",
                x,
                self.constant(name, packed),
                self.constant(f"{name}_scale", scale),
                outputs=output,
                K=weight.shape[1],
                N=weight.shape[0],
                bits=4,
                block_size=BLOCK,
                # x is rounded to int8, in blocks too: integers are multiplied, then scaled
                accuracy_level=4,
            )
        if self.dtype in ("int8", "int4"):
            quantized, scale = quantize_int8(weight)
            weight, scale = self.constant(name, quantized.T), self.constant(f"{name}_scale", scale)
            # x is rounded to uint8, by the smallest and largest number in it
            return self.add(f"{ORT}.DynamicQuantizeMatMul", x, weight, scale, outputs=output)
        return self.add("MatMul", x, self.constant(name, weight.T), outputs=output)

    def build(self) -> onnx.ModelProto:
        """The graph as it is written to a file."""
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.tensors)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ORT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=FORMAT)


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float[out, in] -> (int8[out, in], float[out]), a scale for each output."""
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=LEAST_SCALE)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float[out, in] -> (uint8[out, in / BLOCK, BLOCK / 2], float[out, in / BLOCK]).

    Numbers are 0 to 15 and stand for -8 to 7 times the scale of their block; a byte holds two, the
    first in its lower half.
    """
    blocks = weight.unflatten(1, (-1, BLOCK))  # (out, in / BLOCK, BLOCK)
    # The largest number becomes -8, whatever its sign: the scale may be negative.
    largest = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
    scale = largest / -8
    scale = scale.where(scale.abs() > LEAST_SCALE, LEAST_SCALE)  # (out, in / BLOCK, 1)
    numbers = ((blocks / scale).round() + 8).clamp(0, 15).to(torch.uint8)
    return numbers[..., 0::2] | numbers[..., 1::2] << 4, scale.squeeze(2)
