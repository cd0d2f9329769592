"""A folder of clips from a text file: every prompt in several variations, as WAVs with a JSON index.

    python examples/batch.py prompts.txt clips            # prompts one a line, the folder
    python examples/batch.py prompts.txt clips 4 50       # variations of each prompt (2), sampling steps (100)

Stop it and start it again as you like: a clip whose file is there is not made again, and a WAV is whole or absent.
"""

import json
import re
import sys
import zlib
from pathlib import Path

import dit_trt

FIRST_SEED = 1000


def main(prompt_file: str, folder: str, variations: int = 2, steps: int = 100) -> None:
    lines = (line.strip() for line in Path(prompt_file).read_text("utf-8").splitlines())
    prompts = list(dict.fromkeys(line for line in lines if line))
    pipeline = dit_trt.Pipeline.open()
    bundle = pipeline.bundle.folder.name
    index, made = [], 0
    for prompt in prompts:
        # Each prompt has the same seeds, so a clip stays what it is when the list of prompts grows or is sorted.
        for seed in range(FIRST_SEED, FIRST_SEED + variations):
            words = re.sub(r"\W+", "-", prompt.lower())[:40].strip("-")
            mark = zlib.crc32(f"{bundle}\n{prompt}\n{steps}".encode())  # tells apart clips whose words and seed do not
            path = Path(folder) / f"{words}-{seed}-{mark:08x}.wav"
            index.append({"file": path.name, "prompt": prompt, "seed": seed, "steps": steps, "bundle": bundle})
            if not path.exists():
                audio, sample_rate = pipeline(prompt, seed=seed, steps=steps)
                dit_trt.write_wav(path, audio, sample_rate)
                made += 1
    (Path(folder) / "index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")
    print(f"{len(index)} clips in {folder}, {made} of them new")


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 5:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
    except dit_trt.UserError as mistake:
        sys.exit(f"Error: {mistake}")
