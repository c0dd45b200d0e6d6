"""The command `winnow`, also `python -m winnow`: what is done outside of a workflow run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from winnow.commands.formats import FORMATS
from winnow.errors import InputError, absent, missing

DTYPES = ("original", "float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    whole = argparse.ArgumentParser(prog="winnow", description="Compress transformer language models, and see what it costs.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    command = commands.add_parser("init", help="write a configuration for a model of your own")
    command.add_argument("model", help="directory in Hugging Face layout, or hub id together with --revision")
    command.add_argument("--revision", help="commit of the hub repository, 40 hexadecimal digits")
    text = "of calibration: txt, jsonl or parquet (default: the demo's, for a first look)"
    command.add_argument("--text", nargs="+", default=[], metavar="FILE", help=f"text {text}")
    text = "text of evaluation (default: the last tenth of the rows of --text)"
    command.add_argument("--eval-text", nargs="+", default=[], metavar="FILE", help=text)
    text = "shares of the bytes of all FFN and attention matrices (default: 0.4)"
    command.add_argument("--keep", nargs="+", type=float, default=[0.4], metavar="SHARE", help=text)
    command.add_argument("--method", nargs="+", default=["winnow"], metavar="NAME", help="presets to compare (default: winnow)")
    command.add_argument("--output", type=Path, default=Path("mine.yaml"), help="a new file (default: mine.yaml)")
    command = commands.add_parser("show", help="print the losses of a results folder")
    command.add_argument("results", type=Path)
    command.add_argument("--markdown", action="store_true", help="a table of losses for a README")
    command.add_argument("--latency", action="store_true", help="the latency table, one line per row")
    command.add_argument("--rows", action="store_true", help="a row per cell, with bytes and perplexity")
    command.add_argument("--plot", action=argparse.BooleanOptionalAction, help="the frontier as a plot (default: in a terminal)")
    command = commands.add_parser("explain", help="print what an artefact was made from, and what has changed since")
    command.add_argument("artefact", type=Path)
    command.add_argument("--configfile", type=Path, nargs="*", default=[], help="as given to snakemake")
    command.add_argument("--replace-workflow-config", action="store_true", help="as given to snakemake")
    command = commands.add_parser("export", help="export a checkpoint to a format that does not need winnow")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("directory", type=Path, help="a new directory")
    text = "; ".join(f"{name}: {form.help}" for name, form in FORMATS.items())
    command.add_argument("--format", choices=FORMATS, default="dense", help=text)
    text = "dtype of its tensors (default: as in the original model)"
    command.add_argument("--dtype", choices=DTYPES, help=text)
    text = "of gguf: type of the FFN and attention matrices that are not stored exactly in blocks (default: that of --dtype)"
    command.add_argument("--matrices", choices=(*DTYPES, "q8_0"), help=text)
    text = "of gguf: type of the embeddings and of the output matrix (default: that of --dtype)"
    command.add_argument("--embeddings", choices=(*DTYPES, "q8_0"), help=text)
    command = commands.add_parser("share", help="copy a checkpoint with its measured results in the card")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("directory", type=Path, help="a new directory")
    text = "the command line of lm-eval; --model hf also loads compressed checkpoints"
    commands.add_parser("lm-eval", help=text, add_help=False)
    command = commands.add_parser("config", help="write or check the files generated from the typed configuration")
    command.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    return whole


def run(given: argparse.Namespace) -> None:
    """Run a command other than `lm-eval`. Each is imported when it is asked for."""
    if given.command == "init":
        from winnow.commands.init import init

        for line in init(given.model, given.revision, given.text, given.eval_text, given.keep, given.method, given.output):
            print(line)
    elif given.command == "show":
        from winnow.commands.show import latency, markdown, show

        if given.markdown or given.latency:
            (markdown if given.markdown else latency)(given.results)
        else:
            show(given.results, given.rows, given.plot)
    elif given.command == "explain":
        from winnow.commands.planned import plan_of
        from winnow.planning.explain import explain

        for line in explain(given.artefact, plan_of(given.configfile, given.replace_workflow_config)):
            print(line)
    elif given.command == "export":
        from winnow.commands.hand_on import hand_on

        options = {name: getattr(given, name) for name in ("dtype", "matrices", "embeddings")}
        hand_on(given.checkpoint, given.directory, given.format, options)
    elif given.command == "share":
        from winnow.commands.hand_on import hand_on

        hand_on(given.checkpoint, given.directory)
    else:
        from winnow.planning.config_files import generate

        generate(Path.cwd(), check=given.check)


def lm_eval(options: list[str]) -> None:
    """Run the command line of lm-eval in this process, in which transformers can load compressed checkpoints."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *options]
    cli_evaluate()


def main() -> None:
    whole = parser()
    given, options = whole.parse_known_args()
    if options and given.command != "lm-eval":
        whole.error(f"unrecognized arguments: {' '.join(options)}")
    try:
        if given.command == "lm-eval":
            lm_eval(sys.argv[2:])
        else:
            run(given)
    except InputError as error:
        sys.exit(f"winnow: {error}")
    except ModuleNotFoundError as error:
        if library := missing(error):
            sys.exit(f"winnow: {given.command}: {absent(library)}")
        raise


if __name__ == "__main__":
    main()
