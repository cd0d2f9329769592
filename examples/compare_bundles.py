"""What does quantization change? Build FP32 and two strengths of smoothing, compare them step by step.

    python examples/compare_bundles.py                # 20 sampling steps
    python examples/compare_bundles.py 100            # as many as the product takes

Both bundles of a comparison get the same inputs, those of the FP32 trajectory; the cosine is that of the velocities.
"""

import sys

import dit_trt

PROMPTS = ["a hound bays in the distance", "heavy rain on a tin roof"]
ALPHAS = (0.5, 0.95)  # the paper's, and the default


def main(steps: int = 20) -> None:
    settings = dit_trt.Settings(steps=steps)
    # Into folders of their own: in the home folder the FP32 one could become "the newest bundle" of `dit-trt run`.
    reference = dit_trt.build(dit_trt.Recipe("none"), output="bundles/fp32")
    results = {}
    for alpha in ALPHAS:
        built = dit_trt.build(dit_trt.Recipe("sqs", alpha=alpha), output=f"bundles/sqs-{alpha}")
        print(f"{built}: {built.int8_linears} of {built.linears} in int8, {built.bundle.size_bytes / 1e6:.1f} MB")
        results[alpha] = dit_trt.compare(built.bundle, reference.bundle, PROMPTS, settings)

    print("step  " + "  ".join(f"alpha {alpha:<4g}" for alpha in ALPHAS))
    for step in range(steps):
        # cosine is [prompts, steps]
        print(f"{step:4d}  " + "  ".join(f"{results[alpha].cosine[:, step].mean():10.4f}" for alpha in ALPHAS))
    for alpha, result in results.items():
        print(f"alpha {alpha}: worst step {result.worst_step}, cosine {result.worst_step_cosine:.4f}")


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except dit_trt.UserError as mistake:
        sys.exit(f"Error: {mistake}")
