"""What a quantized model sounds like beside FP32: clips of a caption list, their metrics, the paper's Table 1."""
