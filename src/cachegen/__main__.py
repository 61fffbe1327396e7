"""The command `cachegen`: look at what files, folders and stores hold, and check it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cachegen import startup

startup.guard_imports(__name__)

from cachegen import command_line  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__, prog="cachegen")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    where = "a chunk file, a tables file, a KV file, a folder of chunks, or a store: a folder, s3://, gs:// or az://"
    for name, purpose in (
        ("inspect", "print what is there: model, tokens, method, levels, bytes, and what is missing or damaged"),
        ("verify", "check every byte; what is missing or damaged is an error"),
    ):
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("path", metavar="PATH_OR_URL", help=where)
        if name == "verify":
            command.add_argument("--model_id", help="a model that must be the one whose cache it is")
        command_line.add_common_flags(command)
    purpose = "list the profiles of models in some folders, and check them; a damaged one is an error"
    command = commands.add_parser("profiles", help=purpose, description=purpose)
    command.add_argument(
        "places", nargs="*", default=["models"], metavar="FOLDER", help="a profile's, a model's, or one that holds such"
    )
    command_line.add_common_flags(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_look, build_parser(), argv)


def _look(args: argparse.Namespace) -> None:
    from cachegen.errors import BitstreamError
    from cachegen.inspection import describe_lines, inspect, inspect_profiles

    report = command_line.Reporter(args)
    record = inspect_profiles(args.places) if args.command == "profiles" else inspect(args.path)
    if args.command != "verify":
        for label, value in describe_lines(record):
            report.row(label, value)
        for problem in record["problems"]:
            report.row("problem", problem)
    elif args.model_id is not None:
        _check_model(record, args.model_id)
    if args.command != "inspect" and record["problems"]:
        first, *others = record["problems"]
        more = f" (and {len(others)} more: cachegen inspect lists them)" if others else ""
        raise BitstreamError(f"{first}{more}")
    if args.command == "verify":
        report.row("whole", args.path)
    if args.json is not None:
        command_line.write_json(args.json, record)


def _check_model(record: dict, model_id: str) -> None:
    """Refuse what is not of a model, without loading the model."""
    from cachegen.errors import MismatchError
    from cachegen.pipeline.fingerprint import compute_fingerprint

    fingerprint = compute_fingerprint(model_id)
    for document in record.get("documents", [record]):
        if document["model_fingerprint"] != fingerprint:
            place = document.get("name", record["path"])
            raise MismatchError(
                f"{place}: model_fingerprint is {document['model_fingerprint'][:12]}, but that of {model_id} is "
                f"{fingerprint[:12]}: it is of another model"
            )


if __name__ == "__main__":
    sys.exit(main())
