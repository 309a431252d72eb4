"""Rivals of the runtime in C, where they are installed: the speed, or "missing: " and why."""

from __future__ import annotations

import importlib
import time

import numpy as np


def measure_onnxruntime(width: int) -> float | str:
    """Billions of weights a second of a dynamic int8 product of one token, on one thread.

    DynamicQuantizeLinear and MatMulInteger, as onnxruntime's own quantize_dynamic writes them.
    """
    try:
        runtime, onnx = importlib.import_module("onnxruntime"), importlib.import_module("onnx")
    except ImportError as error:
        return f"missing: {error}"
    helper, kinds = onnx.helper, onnx.TensorProto
    codes = np.random.default_rng(0).integers(-1, 2, (width, width)).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["codes", "weights", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", kinds.FLOAT, [1, width])],
        [helper.make_tensor_value_info("y", kinds.INT32, [1, width])],
        [onnx.numpy_helper.from_array(codes, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x, least = {"x": np.random.default_rng(1).standard_normal((1, width), np.float32)}, float("inf")
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        began = time.perf_counter()
        session.run(None, x)
        least = min(least, time.perf_counter() - began)
    return width * width / least / 1e9


def measure_llama() -> float | str:
    """Why there is no figure: it has no retention, and a file of random weights of equal size is not made here."""
    try:
        importlib.import_module("llama_cpp")
    except ImportError as error:
        return f"missing: {error}"
    return "missing: llama.cpp has no retention, and no GGUF file of equal size is at hand"
