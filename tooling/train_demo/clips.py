"""A bundle in, the acceptance test's clips out: `<class>-<seed>.wav` for every class, with the product's defaults.

python -m dit_trt.tooling.train_demo.clips --output wavs [--bundle NAME] [--seeds 4] [--dogs 32]

With `--pairs` those of mixtures: `<class>+<class>-<seed>.wav`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...runtime.pipeline import Pipeline, Settings
from ...runtime.wav import write_wav
from .captions import PAIR_PROMPTS, PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bundle", help="default: the newest")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--dogs", type=int, default=0, help="of dogs at least so many")
    parser.add_argument("--pairs", action="store_true", help="two sounds at once")
    args = parser.parse_args()
    if args.pairs and args.dogs:
        parser.error("--dogs has nothing to do with --pairs")
    prompts = {"+".join(pair): prompt for pair, prompt in PAIR_PROMPTS.items()} if args.pairs else PROMPTS
    pipeline = Pipeline.open(args.bundle)
    for label, prompt in prompts.items():
        seeds = max(args.seeds, args.dogs) if label == "dog" else args.seeds
        for clip in pipeline.generate([prompt], Settings(), num_variations=seeds, batch=min(seeds, 8)):
            write_wav(args.output / f"{label}-{clip.seed}.wav", clip.audio, clip.sample_rate)
        print(label, flush=True)


if __name__ == "__main__":
    main()
