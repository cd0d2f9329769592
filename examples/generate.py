"""Sound in an app: open a bundle once, make clips, show how far it is, hand on the samples.

dit-trt build                                     # once; needs the build extra, what follows does not
python examples/generate.py "dog barking" "a rooster crows"
"""

import sys

import dit_trt

SETTINGS = dit_trt.Settings(steps=100, cfg_scale=7.0, seed=1000)


def main(prompts: list[str]) -> None:
    pipeline = dit_trt.Pipeline.open()  # the newest bundle; engines are compiled at first use and then stay

    def on_step(clip: int, step: int) -> None:  # step is -1 before the first one
        end = "\n" if step + 1 == SETTINGS.steps else ""
        print(f"\rclip {clip + 1} of {len(prompts)}, step {step + 1} of {SETTINGS.steps}", end=end, file=sys.stderr)

    for clip in pipeline.generate(prompts, SETTINGS, seconds=2, on_step=on_step):
        # clip.audio is float32 [2, samples] in -1..1. Sound devices and encoders mostly take interleaved 16-bit PCM:
        pcm = (clip.audio.T * 32767).round().astype("<i2").tobytes()
        name = f"clip-{clip.seed}.wav"
        dit_trt.write_wav(name, clip.audio, clip.sample_rate)
        print(f"{name}: {clip.prompt}, {len(pcm)} bytes of PCM at {clip.sample_rate} Hz")


if __name__ == "__main__":
    try:
        main(sys.argv[1:] or ["dog barking"])
    except dit_trt.UserError as mistake:  # one line that names the fix; anything else is a bug
        sys.exit(f"Error: {mistake}")
