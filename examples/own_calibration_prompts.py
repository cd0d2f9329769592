"""Calibrate on prompts of your own: ranges are then those of the sounds you make.

    python examples/own_calibration_prompts.py prompts.txt        # one a line, or AudioCaps' CSV
    python examples/own_calibration_prompts.py prompts.txt 20     # fewer sampling steps: quicker, less exact

Ctrl-C loses nothing: started again, it goes on. Calibrated once, the table is kept, and the next build takes it.
"""

import sys

import dit_trt
from dit_trt.calib_data.reader import read_prompts


def main(prompt_file: str, steps: int = 100) -> None:
    prompts = read_prompts(prompt_file)
    calibration = dit_trt.CalibrationOptions(prompts=prompt_file, steps=steps)
    built = dit_trt.build(dit_trt.Recipe("sqs"), calibration=calibration, output="own-calibration", say=print)
    print(f"{built}: {built.int8_linears} of {built.linears} Linears in int8")

    audio, sample_rate = dit_trt.Pipeline.open(built)(prompts[0], seconds=2)
    dit_trt.write_wav("own-calibration.wav", audio, sample_rate)
    print(f"own-calibration.wav: {prompts[0]}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(sys.argv[1], *map(int, sys.argv[2:]))
    except dit_trt.UserError as mistake:
        sys.exit(f"Error: {mistake}")
