"""A page on a run, in one HTML file that needs no network:

    python -m gtc_dist.report --run RUN [--against RUN2] [--out FILE] [--titles FILE]

What the run was trained on, its metrics beside popularity and an earlier run, curves, what each part of the model does,
lists of some users, where the time went, checkpoints and restarts. FILE is report.html in the run folder if --out does
not name another; a report that is there is replaced. --titles shows names from a table of the items.

Parts and lists need the catalog and the best checkpoint, whose embeddings are computed; --logs-only leaves them out,
and so does a catalog that is gone.
"""

import argparse
import functools

import numpy as np

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.checkpoint.run_folder import REPORT_FILE
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.launch.offline_job import parse_run_command, run_on_ranks_or_here
from gtc_dist.recommend.item_choice import item_titles
from gtc_dist.recommend.lists import index_of_texts
from gtc_dist.report.model_facts import ListQuestion, model_facts
from gtc_dist.report.model_sections import lists_section, parts_section
from gtc_dist.report.page import REPORT_MARKER, html_page
from gtc_dist.report.run_data import RunData, read_run
from gtc_dist.report.search_section import search_section
from gtc_dist.report.sections import (
    config_section,
    curves_section,
    data_section,
    files_section,
    overview,
    quality_section,
    time_section,
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="RUN2", help="URI of an earlier run that is shown beside this one")
    parser.add_argument("--out", metavar="FILE", help=f"file to write (default: {REPORT_FILE} in the run folder)")
    parser.add_argument("--titles", metavar="FILE", help="table with names of the items")
    parser.add_argument("--title", default="title", metavar="COLUMN", help="its column with the name (%(default)s)")
    parser.add_argument("--id", metavar="COLUMN", help="its column with the id (default: as in the interactions)")
    parser.add_argument("--user", action="append", metavar="ID", help="show this user's list; may be repeated")
    parser.add_argument("--logs-only", action="store_true", help="read the logs alone, do not load the model")
    args = parse_run_command(parser, argv)
    refuse_relative_paths({f"--{name}": getattr(args, name) for name in ("run", "against", "catalog", "out", "titles")})
    out = storage.absolute(args.out or storage.join(args.run, REPORT_FILE))
    run = read_run(args.run, args.catalog)
    other = read_run(args.against) if args.against else None
    check_out(out)
    facts = None if args.logs_only or run.data is None else facts_of(args, run)
    storage.write_bytes(out, report_page(run, other, facts).encode())
    print(f"the report is in {out}")


def check_out(out: str) -> None:
    """Raises InputError for a file that is no report, which must not be replaced, or a place that cannot be written."""
    if storage.exists(out):
        with storage.open_input(out) as file:
            if REPORT_MARKER.encode() not in file.read(200):
                raise InputError(f"{out} exists and is no report; name another file with --out")
    storage.check_writable(out.rpartition("/")[0] or "/")


def facts_of(args: argparse.Namespace, run: RunData) -> dict | None:
    """`model_facts`, or None, with the reason in `run.missing`, for a run without a checkpoint on this catalog.

    Raises:
        InputError: titles that cannot be read, or a user that the catalog lacks.
    """
    try:
        run_ref = find_run(args.run, args.catalog)
    except InputError as error:
        run.missing.append(f"The model could not be loaded, so parts and lists are left out: {error}")
        return None
    catalog, id_column = Catalog(run_ref.config.data.catalog), args.id or run_ref.config.data.interactions.item
    titles = None if args.titles is None else item_titles(catalog, args.titles, id_column, args.title)
    users = np.unique(index_of_texts(catalog, "users", args.user)) if args.user else None
    return run_on_ranks_or_here(args, run_ref, functools.partial(model_facts, question=ListQuestion(users, titles)))


def report_page(run: RunData, other: RunData | None, facts: dict | None) -> str:
    """The HTML text."""
    sections = [
        overview(run, other),
        quality_section(run, other),
        curves_section(run, other),
        lists_section(facts),
        parts_section(run, facts),
        search_section(run),
        data_section(run),
        time_section(run),
        files_section(run),
        config_section(run, other),
    ]
    return html_page(f"gtc report: {run.name}", sections)
