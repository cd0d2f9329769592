"""The demo's neural decoder: its fixed part in numpy, its graph on both CPU engines, extreme latents, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import mel_vocoder_config, random_vocoder

from dit_trt.engines.openvino import OpenVINOEngine
from dit_trt.exporters.float_graphs import export_topologies
from dit_trt.exporters.mel_pca import MelPcaDecoder
from dit_trt.exporters.mel_vocoder import QUIET, MelVocoder
