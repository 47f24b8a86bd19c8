"""The command line: `linearize convert | rank-layers | sweep | generate | eval | process | serve | bench | ...`.

Only parses and prints; each verb imports what it needs when it runs, so `--help` answers at once. A setting
of the recipe never becomes an option here: `--set` reaches all of them.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from linearize import __version__, shipped
from linearize import cli_examples as examples
from linearize import cli_values as values
from linearize.errors import LinearizeError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 2 (the user's to mend), 130 (interrupted)."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except LinearizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted{args.if_interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (head, less) has seen enough; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar of the command line."""
    parser = argparse.ArgumentParser(
        prog="linearize",
        description="Turn a pretrained Transformer into one whose memory does not grow: sliding-window "
        "softmax, sinks and Taylor linear attention, in a normal Hugging Face folder.",
        epilog=examples.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"linearize {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_convert(verbs)
    _add_rank_layers(verbs)
    _add_sweep(verbs)
    _add_generate(verbs)
    _add_eval(verbs)
    _add_process(verbs)
    _add_serve(verbs)
    _add_bench(verbs)
    about = "show the report card of a converted model, or several side by side"
    report = _verb(verbs, "report", _report, about, examples.REPORT_EPILOG)
    report.add_argument("folders", nargs="+", metavar="DIR", help="a converted model")
    about = "its row in place of the untrained window + sinks: a model converted with feature map equal_window"
    report.add_argument("--baseline", metavar="DIR", help=about)
    doctor = _verb(verbs, "doctor", _doctor, "say what this machine has and which kernels it runs")
    doctor.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    _add_recipes(verbs)
    return parser


def _verb(verbs, name: str, run, help: str, epilog: str = "") -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run, if_interrupted="")
    return parser


def _add_convert(verbs) -> None:
    parser = _verb(verbs, "convert", _convert, "convert a model by a recipe", examples.CONVERT_EPILOG)
    _add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and say what would be done")
    parser.add_argument("--force", action="store_true", help="start over, replacing what the output folder holds")


def _add_rank_layers(verbs) -> None:
    about = "find the layers or kv heads that should stay softmax"
    parser = _verb(verbs, "rank-layers", _rank_layers, about, examples.RANK_EPILOG)
    _add_recipe(parser)
    parser.add_argument("--force", action="store_true", help="start over, without what was matched before")


def _add_sweep(verbs) -> None:
    parser = _verb(verbs, "sweep", _sweep, "convert by every combination of some settings", examples.SWEEP_EPILOG)
    _add_recipe(parser)
    about = "values of a setting; several grids are multiplied"
    parser.add_argument("--grid", action="append", required=True, metavar="K=V,V", help=about)
    parser.add_argument("--keep-models", action="store_true", help="keep the variants' weights too")


def _add_recipe(parser) -> None:
    parser.add_argument("source", metavar="RECIPE_OR_MODEL", help="a .yaml file, a shipped recipe's name or a model")
    about = "change a setting of the recipe"
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="K=V", help=about)
    parser.set_defaults(if_interrupted="; give the same command again to resume")


def _add_generate(verbs) -> None:
    parser = _verb(verbs, "generate", _generate, "continue a text with a converted model", examples.GENERATE_EPILOG)
    parser.add_argument("folder", metavar="DIR", help="a converted model")
    about = "the text to continue, - for standard input; several make a batch"
    parser.add_argument("-p", "--prompt", dest="prompts", action="append", required=True, metavar="TEXT", help=about)
    parser.add_argument("--chat", action="store_true", help="put the prompt through the chat template")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    _add_sampling(parser, "makes samples repeat")
    memory = parser.add_argument_group("what the model remembers")
    memory.add_argument("--save-state", metavar="FILE", help="write what it remembers of the prompt, and end")
    memory.add_argument("--state", metavar="FILE", help="the prompts follow a text that was saved so")


def _add_sampling(parser, seed: str) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=values.positive, default=64, metavar="N", help="default 64")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus; 1 (default) is off")
    sampling.add_argument("--seed", type=int, default=None, metavar="N", help=seed)
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="the K likeliest; 0 (default) is off")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="share of the likeliest's; 0 is off")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 (default) is off")
    about = "end after this text; repeatable"
    sampling.add_argument("--stop", type=values.some_text, action="append", default=[], metavar="TEXT", help=about)


def _add_eval(verbs) -> None:
    parser = _verb(verbs, "eval", _eval, "run lm-eval tasks on a converted model", examples.EVAL_EPILOG)
    parser.add_argument("folder", metavar="DIR", help="a converted model, or any other to compare with")
    what = parser.add_argument_group("what to run")
    what.add_argument("--tasks", required=True, type=values.names, metavar="A,B", help="lm-eval tasks or groups")
    what.add_argument("--include-path", metavar="DIR", help="folder of your own tasks")
    what.add_argument("--limit", type=values.positive, metavar="N", help="examples a task (default all)")
    what.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in the prompt (default the task's)"
    )
    what.add_argument("--output", type=Path, metavar="FILE", help="also write everything as JSON")
    how = parser.add_argument_group("how to run it")
    how.add_argument("--batch-size", type=values.batch_size, default=8, metavar="N", help="default 8; auto: by memory")
    how.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    how.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="default auto"
    )


def _add_process(verbs) -> None:
    parser = _verb(verbs, "process", _process, "answer every row of a file", examples.PROCESS_EPILOG)
    parser.add_argument("folder", metavar="DIR", help="a converted model")
    parser.add_argument("source", metavar="IN", help=".jsonl, .parquet, a folder of Dataset.save_to_disk, a hub id")
    parser.add_argument("target", metavar="OUT.jsonl", help="one line a row, in order")
    parser.add_argument("--name", metavar="CONFIG", help="of a hub dataset: which of its configurations")
    parser.add_argument("--split", metavar="SPLIT", help="of a hub dataset (default train)")
    parser.add_argument("--template", default="{text}", metavar="TEXT", help="the prompt; columns in braces")
    parser.add_argument("--chat", action="store_true", help="put the prompt through the chat template")
    parser.add_argument("--prefix", default="", metavar="TEXT", help="text before every prompt, read once")
    parser.add_argument("--field", default="output", metavar="NAME", help="the answers' column (default output)")
    parser.add_argument("--batch", type=values.positive, metavar="N", help="rows at once (default: by memory)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    length = "most tokens of a row, prompt and answer; longer ones are errors (default: what the longest row needs)"
    parser.add_argument("--max-length", type=values.positive, default=None, metavar="N", help=length)
    parser.add_argument("--disable-compile", action="store_const", const=True, help="no torch.compile in a long run")
    _add_sampling(parser, "makes samples repeat: row n draws by N + n")
    parser.set_defaults(if_interrupted="; give the same command again to resume")


def _add_serve(verbs) -> None:
    parser = _verb(verbs, "serve", _serve, "answer OpenAI clients over HTTP (chat and completions, streamed or not)")
    parser.add_argument("folder", metavar="DIR", help="a converted model; clients name it just so")
    parser.add_argument("--host", default="localhost", help="default localhost")
    parser.add_argument("--port", type=values.port, default=8000, metavar="N", help="default 8000")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")


def _add_bench(verbs) -> None:
    parser = _verb(verbs, "bench", None, "measure speed and memory on this machine", examples.BENCH_EPILOG)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    about = "the attention kernels beside their peers; all options go to python -m linearize_kernels.bench"
    # no option is ours, so none is taken for one here
    kernels = actions.add_parser("kernels", help=about, prefix_chars="\0", add_help=False)
    kernels.add_argument("rest", nargs="*")
    kernels.set_defaults(run=_bench_kernels, if_interrupted="")
    parser = _verb(actions, "generation", _bench_generation, "generation beside a teacher", examples.BENCH_EPILOG)
    what = parser.add_argument_group("what to measure")
    what.add_argument("folder", nargs="?", metavar="DIR", help="a converted model")
    what.add_argument("--against", metavar="MODEL", help="its teacher: a folder, hub id or GGUF file")
    what.add_argument("--shape", metavar="NAME", help="random weights: llama-3.1-8b, based-1.3b or smollm2-135m")
    what.add_argument("--window", type=values.positive, metavar="N", help="with --shape: the window (default 192)")
    what.add_argument("--map-dim", type=values.positive, metavar="N", help="with --shape: of the map (default 4)")
    what.add_argument("--prompts", type=values.prompts, default="128,1k,8k,32k", metavar="N,N", help="%(default)s")
    what.add_argument("--new", type=values.positive, default=1024, metavar="N", help="new tokens a row (default 1024)")
    what.add_argument("--batches", type=values.batches, default="1,max", metavar="N,N", help="default 1,max: what fits")
    what.add_argument("--cells", type=values.pairs, metavar="P:B,P:B", help="pairs prompt:batch instead: 1k:128,8k:max")
    sides = "converted, teacher-static, teacher-dynamic (all)"
    what.add_argument("--sides", type=values.names, metavar="A,B", help=sides)
    what.add_argument("--steps", type=values.positive, metavar="N", help="time N of the new tokens (default all)")
    what.add_argument("--made-up", action="store_true", help="decode from random memory: no prompt is read")
    about = "no torch.compile of the step, on both sides (default: where the step is one CUDA graph)"
    parser.add_argument("--disable-compile", action="store_const", const=True, help=about)
    parser.add_argument("--profile", action="store_true", help="also list the kernels of a step by their time")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="default bfloat16")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    parser.add_argument("--output", metavar="PATH", help="also write PATH.csv, PATH.ratios.csv and PATH.png")
    _add_bench_speculative(actions)


def _add_bench_speculative(actions) -> None:
    about = "assisted decoding beside plain: a converted model drafts for its teacher, prompt lookup for the converted"
    parser = _verb(actions, "speculative", _bench_speculative, about, examples.BENCH_EPILOG)
    parser.add_argument("folder", metavar="DIR", help="a converted model")
    parser.add_argument("--against", metavar="MODEL", help="its teacher, for which it drafts")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="its beginnings are the prompts")
    parser.add_argument("--prompts", type=values.counts, default="256,1k", metavar="N,N", help="tokens; default 256,1k")
    parser.add_argument("--new", type=values.positive, default=128, metavar="N", help="new tokens (default 128)")
    parser.add_argument("--lookup", type=values.positive, default=8, metavar="N", help="tokens looked up (default 8)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="default float32")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")


def _add_recipes(verbs) -> None:
    parser = _verb(verbs, "recipes", None, "list, show and copy the shipped recipes", examples.RECIPES_EPILOG)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _verb(actions, "ls", _recipes_ls, "list the shipped recipes")
    show = _verb(actions, "show", _recipes_show, "print a shipped recipe")
    show.add_argument("name", metavar="NAME")
    copy = _verb(actions, "cp", _recipes_cp, "copy a shipped recipe, to change it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("target", metavar="FILE", help="the new .yaml file")
    copy.add_argument("--force", action="store_true", help="overwrite the file")


def _convert(args: argparse.Namespace) -> None:
    from linearize.recipe import load_recipe

    recipe = load_recipe(args.source, args.overrides)
    from linearize.convert import convert, plan

    if args.dry_run:
        print(plan(recipe))
    else:
        convert(recipe, force=args.force)


def _rank_layers(args: argparse.Namespace) -> None:
    from linearize.recipe import load_recipe

    recipe = load_recipe(args.source, args.overrides)
    from linearize.convert import rank_layers

    rank_layers(recipe, force=args.force)


def _sweep(args: argparse.Namespace) -> None:
    from linearize_eval.sweep import sweep

    sweep(args.source, grid=args.grid, overrides=args.overrides, keep_models=args.keep_models)


def _generate(args: argparse.Namespace) -> None:
    try:
        prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompts]
    except UnicodeDecodeError as error:
        raise LinearizeError(f"standard input is no text: {error}") from error
    from linearize.generation import generate_text

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "chat", "seed")
    options = {name: getattr(args, name) for name in (*names, "device", "state", "save_state")}
    generate_text(args.folder, prompts=prompts, **options)


def _eval(args: argparse.Namespace) -> None:
    from linearize.whole_folder import check_folder_of

    if args.output:
        check_folder_of(args.output)
    from linearize_eval.harness import evaluate_folder, format_results

    names = ("tasks", "include_path", "limit", "batch_size", "device", "dtype", "num_fewshot")
    results = evaluate_folder(args.folder, **{name: getattr(args, name) for name in names})
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(format_results(results))


def _process(args: argparse.Namespace) -> None:
    from linearize.process import process
    from linearize.sampling import Sampling

    names = ("folder", "source", "target", "name", "split", "template", "chat", "prefix", "batch", "max_new_tokens",
             "max_length", "device", "disable_compile", "stop")  # fmt: skip
    how = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(**{name: getattr(args, name) for name in how})
    process(**{name: getattr(args, name) for name in names}, sampling=sampling, field_name=args.field)


def _serve(args: argparse.Namespace) -> None:
    from linearize.serve import serve

    serve(args.folder, host=args.host, port=args.port, device=args.device)


def _bench_kernels(args: argparse.Namespace) -> None:
    from linearize_kernels import bench

    bench.main(args.rest)


def _bench_generation(args: argparse.Namespace) -> None:
    from linearize_eval.generation_bench import bench_generation

    names = ("folder", "against", "shape", "prompts", "new", "batches", "sides", "dtype", "device", "disable_compile")
    more = ("output", "window", "map_dim", "steps", "made_up", "cells", "profile")
    bench_generation(**{name: getattr(args, name) for name in (*names, *more)})


def _bench_speculative(args: argparse.Namespace) -> None:
    from linearize_eval.speculative_bench import bench_speculative

    names = ("folder", "against", "text", "prompts", "new", "lookup", "dtype", "device")
    bench_speculative(**{name: getattr(args, name) for name in names})


def _report(args: argparse.Namespace) -> None:
    from linearize_eval.report import load_report

    reports = [load_report(folder) for folder in args.folders]
    if args.baseline is not None:
        from linearize_eval.baseline import load_baseline, with_baseline

        if len(reports) > 1:
            raise LinearizeError("--baseline is a row of one report card; name one folder, or all side by side")
        reports = [with_baseline(reports[0], load_baseline(args.baseline), args.baseline)]
    if len(reports) == 1:
        from linearize_eval.report_text import print_report

        print_report(reports[0])
    else:
        from linearize_eval.comparison import names_of, print_comparison

        print_comparison(dict(zip(names_of(args.folders), reports, strict=True)))


def _doctor(args: argparse.Namespace) -> None:
    from linearize.doctor import diagnose

    print(diagnose(args.device))


def _recipes_ls(args: argparse.Namespace) -> None:
    recipes = shipped.list_recipes()
    width = max(len(name) for name, _ in recipes)
    for name, about in recipes:
        print(f"{name:<{width}}  {about}")


def _recipes_show(args: argparse.Namespace) -> None:
    print(shipped.recipe_path(args.name).read_text(encoding="utf-8"), end="")


def _recipes_cp(args: argparse.Namespace) -> None:
    path = shipped.copy_recipe(args.name, args.target, force=args.force)
    print(f"{path}  (next: linearize convert {path})")


if __name__ == "__main__":
    sys.exit(main())
