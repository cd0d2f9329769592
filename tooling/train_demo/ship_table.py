"""Calibrate the demo afresh with the defaults and ship the slim table with it (absmax only, fp16 rounded up).

python -m dit_trt.tooling.train_demo.ship_table
"""

from __future__ import annotations

import argparse

from ...engines.base import choose_backend
from ...exporters.checkpoint import Checkpoint
from ...exporters.model_files import DEMO
from ..calibrate import calibrate
from ..tables import SHIPPED, slim_table
from ..workflow import CalibrationOptions, reference_bundle


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    checkpoint = Checkpoint.open("demo")
    reference = reference_bundle(checkpoint, choose_backend("auto"), print)
    slim_table(calibrate(checkpoint, reference, CalibrationOptions().plan(checkpoint)), DEMO / SHIPPED)


if __name__ == "__main__":
    main()
