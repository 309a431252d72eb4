"""`mixkabrn publish`: an export, uploaded to the Hugging Face hub."""

from __future__ import annotations

import argparse

from kabrn_dist.cli.arguments import Subparsers, add_command, given_path

DESCRIPTION = """Checks that the export is whole, that its hashes are right and that its card names a license, and
uploads it as one commit. Repository and branch are made if they are missing. The token is that of HF_TOKEN or of
`hf auth login`; it is never shown. Needs: pip install kabrn_dist[hub]."""

EXAMPLES = """  mixkabrn publish exports/tiny ada/tiny --dry-run
  HF_TOKEN=… mixkabrn publish exports/tiny ada/tiny --private
  mixkabrn publish exports/tiny ada/tiny --revision step-1200 --license mit
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn publish`."""
    parser = add_command(subparsers, "publish", run, "upload an export to the Hugging Face hub", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("folder", type=given_path, metavar="EXPORT", help="folder that `mixkabrn export` wrote")
    add("repository", metavar="OWNER/NAME", help="repository on the hub")
    add("--license", metavar="ID", help="license for the card, such as mit (default: the one that the card names)")
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", default="main", metavar="BRANCH", help="branch to commit to (default main)")
    add("--endpoint", metavar="URL", help="address of another server (default: HF_ENDPOINT, or the hub)")
    add("--dry-run", action="store_true", help="check the export and list what would be uploaded; send nothing")


def run(options: argparse.Namespace) -> int:
    """Upload, or with --dry-run list what would be; return the exit code."""
    from kabrn_dist.hub.publish import check_repository, plan_publication, publish

    check_repository(options.repository)
    publication = plan_publication(options.folder, options.license)
    print(publication.describe())
    if options.dry_run:
        print(f"nothing was sent (--dry-run); would go to {options.repository}, branch {options.revision}")
        return 0
    address = publish(publication, options.repository, options.private, options.revision, options.endpoint)
    print(f"published {address}")
    return 0
