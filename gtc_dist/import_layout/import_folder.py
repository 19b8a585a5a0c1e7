"""Tables and a configuration from a folder of a public data set:

    gtc import mmssl DiffMM/Datasets/tiktok --out data/tiktok
    gtc import amazon downloads/beauty --out data/beauty

LAYOUT says how the files of FOLDER are arranged:

    mmssl      trnMat.pkl, valMat.pkl, tstMat.pkl (or train_mat, ..., or train.json, val.json, test.json) and
               image_feat.npy, text_feat.npy, audio_feat.npy: MMSSL, LLMRec, DiffMM
    mmrec      NAME.inter with x_label, image_feat.npy, text_feat.npy: MMRec
    recbole    NAME.inter with typed columns, NAME.item: RecBole's atomic files
    amazon     Amazon Reviews 2014, 2018, 2023: reviews or ratings of one category, and its metadata
    movielens  100K, 1M, 10M, 20M, 25M, 32M

OUT gets Parquet tables that prepare reads, vectors as .npy, texts.parquet for `gtc features`, and config.yaml. The
command prints what to run next. Ids are as they are in the files. An interrupted command leaves a folder that the same
command starts again.
"""

import argparse

import yaml

from gtc_dist.config_file import build_config
from gtc_dist.data import storage
from gtc_dist.data.output_folder import IMPORT_FILES, OutputFolder
from gtc_dist.errors import InputError
from gtc_dist.import_layout.amazon import find_amazon
from gtc_dist.import_layout.atomic_files import find_mmrec, find_recbole
from gtc_dist.import_layout.config_text import CONFIG_NAME, config_yaml, next_commands
from gtc_dist.import_layout.matrices import find_matrices
from gtc_dist.import_layout.movielens import find_movielens
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.progress import ProgressPrinter

LAYOUTS = {
    "mmssl": find_matrices,
    "mmrec": find_mmrec,
    "recbole": find_recbole,
    "amazon": find_amazon,
    "movielens": find_movielens,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="gtc import", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layout", choices=LAYOUTS, metavar="LAYOUT", help=", ".join(LAYOUTS))
    parser.add_argument("folder", metavar="FOLDER", help="folder with the unpacked files, local or s3://")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder to write, new or empty")
    args = parser.parse_args(argv)
    refuse_relative_paths({"FOLDER": args.folder, "--out": args.out})
    for name in (args.folder, args.out):
        if name != name.encode(errors="replace").decode():
            raise InputError(f"{name!a} is not UTF-8 text, which config.yaml needs; rename the folder")
    folder, out = storage.absolute(args.folder), storage.absolute(args.out)
    write = LAYOUTS[args.layout](folder)
    target = new_folder(out, args.out)
    target.mark()
    try:
        tables = write(out, ProgressPrinter())
        text = config_yaml(args.layout, folder, out, tables)
        build_config(yaml.safe_load(text), storage.join(out, CONFIG_NAME))
        storage.write_bytes(storage.join(out, CONFIG_NAME), text.encode())
    except InputError:
        target.clear()
        storage.remove_tree(storage.join(out, IMPORT_FILES.marker))
        raise
    target.finish({"layout": args.layout, "folder": folder, "rows": tables.rows, "items_with_texts": tables.items})
    print(next_commands(out, tables))


def new_folder(out: str, named: str) -> OutputFolder:
    """The output folder, emptied of an interrupted import. Raises InputError where it holds anything else."""
    folder = OutputFolder(
        out,
        title="the output folder",
        kind="an import",
        own_files=r"(interactions|train|valid|test|texts)\.parquet|(visual|textual|acoustic)\.npy|config\.yaml",
        manifest=IMPORT_FILES.manifest,
        marker=IMPORT_FILES.marker,
    )
    folder.start_empty(named)
    return folder
