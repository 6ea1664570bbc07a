"""Names of the graphs in the onnx/ folder of an exported model: those of transformers.js."""

VISION_NAME, EMBEDDINGS_NAME = "vision_encoder.onnx", "embed_tokens.onnx"
# Of the decoder, by the dtype of its weights.
DECODER_NAMES = {
    "float32": "decoder_model_merged.onnx",
    "int8": "decoder_model_merged_quantized.onnx",
    "int4": "decoder_model_merged_q4.onnx",
}
