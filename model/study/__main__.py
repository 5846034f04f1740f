"""`python -m model.study {attention,granularity,mtp,shared-experts,router,all}`, and what is needed
around them: `corpus OUT` collects the text, `time` measures steps, `report LOG…` prints the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from model.errors import ModelError
from model.study.corpus import Corpus, load_corpus, manifest_of, save_corpus
from model.study.variants import SIZES, STUDIES, VARIANTS, Size, names_of

CORPUS = Path(".cache/study/corpus.bin")
LOG = Path(".cache/study/study.jsonl")
NANO = Path(__file__).resolve().parent.parent / "checkpoints" / "nano"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake of the caller, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "report":
            _report(args)
        elif args.command == "corpus":
            _corpus(args.out, args.tokens)
        else:
            _run(args)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _report(args: argparse.Namespace) -> None:
    from model.study.log import read_log
    from model.study.report import tables, write_into

    text = tables(read_log(args.logs))
    if args.into is None:
        print(text, end="")
        return
    try:
        document = args.into.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{args.into}: cannot be read ({error.strerror})") from None
    args.into.write_text(write_into(document, text), encoding="utf-8")


def _corpus(out: Path, tokens: int) -> Corpus:
    from model.study.collect import collect, installed_sources
    from model.tokenizer import Tokenizer

    print("collecting text of installed packages …", file=sys.stderr, flush=True)
    corpus = collect(installed_sources(), Tokenizer.load(NANO), tokens=tokens)
    save_corpus(corpus, out)
    out.with_name(f"{out.name}.json").write_text(manifest_of(corpus) + "\n", encoding="utf-8")
    for split in ("train", "heldout"):
        chosen = corpus.split(split)
        count = sum(package.end - package.start for package in chosen)
        print(f"{split}: {count} tokens of {len(chosen)} packages", file=sys.stderr)
    print(f"{out}: {out.stat().st_size} bytes, corpus {corpus.digest}", file=sys.stderr)
    return corpus


def _run(args: argparse.Namespace) -> None:
    import torch

    from model.study.run import device_of, run_all, timings

    size = _size(args)
    names = names_of([*STUDIES] if args.command in ("all", "time") else [args.command])
    if args.only:
        names = _chosen(args.only, names)
    device = device_of(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.corpus is None and not CORPUS.exists():
        _corpus(CORPUS, args.tokens)
    corpus = load_corpus(args.corpus or CORPUS)
    if args.command == "time":
        total = 0.0
        for line in timings(size, corpus, names, device):
            total += line["run_s"]
            print(json.dumps(line), flush=True)
        each = total / size.steps  # of one step of every variant
        print(json.dumps({"seconds_a_seed": round(total), "seconds_a_step_of_all": round(each, 4)}))
        return
    seeds = args.seed or list(range(args.seeds))
    made = run_all(size, corpus, names, seeds, device, args.log)
    asked = len(names) * len(seeds)
    print(f"{made} of {asked} runs made here, the rest elsewhere or before: {args.log}")


def _size(args: argparse.Namespace) -> Size:
    size = SIZES[args.size or ("gpu" if args.device.startswith("cuda") else "mini")]
    if args.steps is not None:
        if args.steps < 1:
            raise ModelError(f"--steps {args.steps}; at least one is needed")
        size = replace(size, steps=args.steps)
    return size


def _chosen(only: Sequence[str], names: Sequence[str]) -> list[str]:
    for name in only:
        if name not in names:
            raise ModelError(f"--only {name}: no such variant here; choose from {', '.join(names)}")
    return [name for name in names if name in only]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    report = commands.add_parser("report", help="print the tables of finished runs")
    report.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    report.add_argument("--into", type=Path, metavar="DOC", help="replace the tables of a page")
    corpus = commands.add_parser("corpus", help="collect the text; .xz makes it small to carry")
    corpus.add_argument("out", type=Path, metavar="OUT")
    corpus.add_argument("--tokens", type=int, default=26_000_000)
    helps = {name: f"compare {', '.join(names)}" for name, names in STUDIES.items()}
    helps |= {"all": "every study", "time": "time a few steps of each variant"}
    for name, text in helps.items():
        study = commands.add_parser(name, help=text)
        add = study.add_argument
        add("--size", choices=sorted(SIZES), help="default: gpu on a GPU, else mini")
        add("--steps", type=int, help="of the baseline, instead of the size's; logs do not mix")
        add("--device", default="cpu", help="cpu, cuda or cuda:N")
        add("--corpus", type=Path, help=f"a prepared corpus (default: {CORPUS}, made if missing)")
        add("--tokens", type=int, default=26_000_000, help="of a corpus that is made")
        add("--log", type=Path, default=LOG, help="one line a run; what it has is not run again")
        add("--only", action="append", metavar="VARIANT", choices=[*VARIANTS], help="repeatable")
        add("--seeds", type=int, default=3, help="seeds 0 … N−1")
        add("--seed", type=int, action="append", help="this seed instead; repeatable")
        add("--threads", type=int, help="of the processor")
    return parser


if __name__ == "__main__":
    sys.exit(main())
