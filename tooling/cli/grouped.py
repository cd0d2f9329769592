"""Options under headings: a command of two dozen of them is readable in 80 columns."""

from __future__ import annotations

from typing import Any

import click


class GroupedOption(click.Option):
    """An option that --help shows under the heading `group`."""

    def __init__(self, *arguments: Any, group: str, **more: Any):
        super().__init__(*arguments, **more)
        self.group = group


class GroupedCommand(click.Command):
    """Shows its options under their headings, in the order in which these first appear; others come last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(param, "group", "Other"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)
