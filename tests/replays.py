"""What the tests of `analyze` replay on the tiny model."""

from dit_trt.runtime.pipeline import Settings

PROMPT = "dog barking"
FF2, QKV, KV = (f"transformer.layers.1.{kind}" for kind in ("ff.ff.2", "self_attn.to_qkv", "cross_attn.to_kv"))
SETTINGS, STEP = Settings(steps=6), 4
