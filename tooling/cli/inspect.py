"""`dit-trt inspect`: what a bundle is made of, from its own files; needs the small runtime only."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import click

from ...engines.errors import UserError
from .common import UsageError, dit_command, megabytes, show, show_table
from .completion import bundles

if TYPE_CHECKING:
    from ...engines.bundle import Bundle

EPILOG = """\b
Examples:
  dit-trt inspect                             the newest bundle
  dit-trt inspect BUNDLE --layers             every Linear, not every kind
  dit-trt inspect BUNDLE --recipe > r.toml    its recipe, as build takes it
  dit-trt inspect --json
"""


@click.command(epilog=EPILOG)
@click.argument("bundle", required=False, shell_complete=bundles)
@click.option("--layers", is_flag=True, help="A row for every Linear instead of one for every kind.")
@click.option("--recipe", is_flag=True, help="Print the recipe as TOML and nothing else.")
@dit_command
def command(bundle: str | None, layers: bool, recipe: bool) -> dict:
    """Show what a bundle is made of: recipe, model, sizes by part, scales of its Linears.

    BUNDLE is a folder or a name that `dit-trt list` shows (default: the newest). Every byte is compared with the
    manifest's sha256.
    """
    from ...engines.bundle import find_bundle
    from ..contents import bundle_layers, bundle_parts, bundle_recipe, papers_count
    from ..recipe_file import recipe_toml

    if recipe and click.get_current_context().params["as_json"]:
        raise UsageError("--recipe prints TOML, --json an object that has the recipe too: give one of them")
    found = find_bundle(bundle).verify()
    parts = bundle_parts(found)
    try:
        rows = bundle_layers(found)
        if recipe:
            show(recipe_toml(bundle_recipe(found)).rstrip())
        else:
            facts, table = _facts(found), _table(rows, every=layers)
            show("\n".join(facts) + "\n")
            shares = [(part, size, f"{size / found.size_bytes:.1%}") for part, size in parts.items()]
            show_table([("part", "bytes", "share"), *shares])
            show(f"without the text encoder, as papers count: {megabytes(papers_count(parts))}")
            show("")
            show_table(table)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the bundle {found.folder.name} is damaged: its manifest lacks or misstates {error}") from None
    return {
        **found.manifest,
        "bundle": str(found.folder),
        "size_bytes": found.size_bytes,
        "size_bytes_by_part": parts,
        "size_bytes_without_text": papers_count(parts),
        "layers": rows,
    }


def _facts(bundle: Bundle) -> list[str]:
    from ...runtime.settings import Settings
    from ..contents import bundle_recipe, has_recipe
    from ..recipe_text import options_of

    manifest = bundle.manifest
    recipe, model, calibration, schedule = (manifest[key] for key in ("recipe", "model", "calibration", "schedule"))
    axes = f"smoothing {recipe['smoothing']}, activation range {recipe['activation_range']}"
    alpha = f", alpha {recipe['alpha']}" if has_recipe(bundle) and recipe["smoothing"] != "none" else ""
    chosen = [f"{key} {', '.join(recipe[key])}" for key in ("include", "exclude") if recipe[key] not in (["*"], [])]
    others = [f"{key} {value}" for key, value in recipe.get("algorithm", {}).items()]  # another quantizer's
    if options := options_of(bundle_recipe(bundle)) if has_recipe(bundle) else others:
        chosen.insert(0, ", ".join(options))
    calibrated = "none"
    if calibration is not None:
        used = calibration["settings"]
        calibrated = f"{len(calibration['prompts'])} prompts x {used['steps']} steps, {used['sampler']}"
        calibrated += f", cfg {used['cfg_scale']:g}"
    levels = Settings.of_schedule(schedule).sigmas
    sigmas = f"sigma {levels[0]:g} to {levels[-2]:.3g}"
    return [
        f"recipe       {recipe['method']} ({axes}), {recipe['bits']}{alpha}",
        *(f"             {line}" for line in chosen),
        f"linears      {manifest['linears']} asked for, {manifest['int8_linears']} in int8",
        f"model        {model['name']} ({model['digest'][:12]}, from {model['source']})",
        f"licence      {(model['licence'].strip() or 'none given').splitlines()[0]}",
        f"backend      {manifest['backend']}{_trunk(manifest)}",
        f"calibration  {calibrated}",
        f"schedule     {schedule['steps']} steps, {schedule['sampler']}, cfg {schedule['cfg']:g}, {sigmas}",
        f"versions     {', '.join(f'{name} {number}' for name, number in manifest['versions'].items())}",
        f"created      {manifest['created']}",
        f"files        {megabytes(bundle.size_bytes)}, every byte matches the manifest",
        f"folder       {bundle.folder}",
    ]


def _trunk(manifest: dict) -> str:
    """What the backend's line says of a trunk that is not FP32, and of a TensorRT plan."""
    trunk, plan = manifest.get("trunk", "fp32"), manifest.get("plan") or {}
    words = [] if trunk == "fp32" else [f"{trunk} trunk"]
    if "attentions" in manifest:
        words.append(f"{manifest['fused_attentions']} of {manifest['attentions']} attentions fused")
    words += [f"{name} {value}" for name, value in plan.items()]
    return "".join(f", {word}" for word in words)


def _table(rows: list[dict], every: bool) -> list[tuple]:
    """The Linears, or their kinds (of equal shape and bits): ranges over all blocks, and the sum of the bytes."""
    head = ("Linear", "in", "out", "count", "bits", "activation scale", "smoothing", "bytes")
    branches = any(row["branch_bytes"] for row in rows)
    order = {kind: i for i, kind in enumerate(dict.fromkeys(row["kind"] for row in rows))}

    def key(row: dict) -> tuple:
        return order[row["kind"]], row["bits"], row["in_features"], row["out_features"]

    groups = [[row] for row in rows] if every else [list(group) for _, group in groupby(sorted(rows, key=key), key=key)]
    table: list[tuple] = [(*head, "branch") if branches else head]
    for group in groups:
        first = group[0]
        scales = [row["activation_scale"] for row in group if row["activation_scale"] is not None]
        low = [row["smoothing_min"] for row in group if row["smoothing_min"] is not None]
        high = [row["smoothing_max"] for row in group if row["smoothing_max"] is not None]
        table.append(
            (
                first["name"] if every else first["kind"],
                first["in_features"],
                first["out_features"],
                len(group),
                first["bits"],
                _range(scales),
                _range(low + high),
                sum(row["bytes"] for row in group),
                *([sum(row["branch_bytes"] for row in group)] if branches else []),
            )
        )
    return table


def _range(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"
