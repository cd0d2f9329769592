"""`dit-trt bench`: one step of the model by every means there is here, in turn, as ratios within one run."""

from __future__ import annotations

from dataclasses import asdict

import click

from ...engines.errors import UserError
from .common import dit_command, path_option, progress, say, tell

EPILOG = """\b
Examples:
  dit-trt bench                              the demo, and one block of
                                             Stable Audio Open's size
  dit-trt bench --shape sao-block --rounds 15 --threads 2
  dit-trt bench --shape sao-block --rows "openvino/w8a8-sq*" --rounds 30
  dit-trt bench --peers --rounds 15 --output results.md
"""


@click.command(epilog=EPILOG)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    default=("demo", "sao-block"),
    show_default=True,
    metavar="SHAPE",
    help="demo, sao-block (synthetic weights, D 1536, 2 x 1025 tokens) or a checkpoint folder; may be repeated.",
)
@click.option("--rounds", type=click.IntRange(1, 1000), default=9, show_default=True, help="All take turns so often.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads of every contender (default: all cores).")
@click.option(
    "--rows",
    metavar="GLOB",
    help="Also these rows of the ablation, wildcards over <backend>/<row>, commas between them.",
)
@click.option(
    "--peers", is_flag=True, help="Also torch.compile, bf16, torchao, diffusers, NNCF and ONNX Runtime's quantizers."
)
@click.option("--output", metavar="FILE", help="Write the tables as Markdown here too.")
@dit_command
def command(
    shapes: tuple[str, ...], rounds: int, threads: int | None, rows: str | None, peers: bool, output: str | None
) -> dict:
    """Time one step of the DiT: PyTorch, and every backend in FP32 and INT8.

    All compute the same step (both guidance halves) on the same inputs, one after the other, round after round; ratios
    are taken within a round. But for sao-block, `dit-trt run` is timed too, from process start to WAV (some 20 s).
    """
    path = path_option(output)
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"cannot write {path}; give --output a file in a folder that exists")

    from ..bench import bench, check_shape, cores, machine, markdown

    more = []
    if rows is not None:
        from ..ablation_rows import chosen_rows

        chosen = [row for row in chosen_rows(rows) if row.is_bundle]
        if not chosen:
            raise UserError(f"--rows {rows} names no bundles, only what the ablation compares them with")
        more = [(row.backend, row.label, row.to_recipe()) for row in chosen]
    threads = threads or cores()
    for shape in shapes:
        check_shape(shape)
    tell(machine())
    reports, parts = [], [machine()]
    for shape in shapes:
        report = bench(shape, rounds, threads, progress, say, more, peers)
        reports.append(report)
        parts.append(markdown(report))
        tell(parts[-1])
    if path is not None:
        path.write_text("\n\n".join(parts) + "\n", "utf-8")
        say(f"written to {path}")
    return {"machine": machine(), "shapes": [asdict(report) for report in reports]}
