"""Examples that `--help` ends with, one text a command."""

EPILOG = """\
from nothing to a converted model:
  linearize recipes ls                              what there is to start from
  linearize recipes cp quickstart my.yaml           a recipe of your own
  linearize convert my.yaml --set match.tokens=1M   convert; the same command again resumes
  linearize generate runs/my -p "My fellow citizens"
  linearize eval runs/my --tasks hellaswag,piqa
"""

CONVERT_EPILOG = """\
examples:
  linearize convert quickstart                      a shipped recipe
  linearize convert my.yaml                         your recipe
  linearize convert HuggingFaceTB/SmolLM2-135M      a model, by the recipe `default`
  linearize convert ./my-model --set data.source='text/*.jsonl' --set output.folder=out
  linearize convert my.yaml --set 'attention.keep_softmax.layers=[0, 1]' --dry-run
  linearize convert my.yaml --set attention.keep_softmax.count=4
  accelerate launch -m linearize.cli convert my.yaml
an interrupted conversion resumes when the same command is given again
"""

RANK_EPILOG = """\
examples:
  linearize rank-layers my.yaml
  linearize rank-layers my.yaml --set attention.keep_softmax.unit=kv_head --set attention.keep_softmax.count=12
  linearize rank-layers my.yaml --set attention.keep_softmax.by=recall_then_kl
calibrates and matches as `convert` would, resuming what is there, and `convert` then goes on from it, with
attention.keep_softmax.count set; OUT.ranking/ gets ranking.json, ranking.png and recipe.yaml, which names the choice
"""

SWEEP_EPILOG = """\
examples:
  linearize sweep my.yaml --grid attention.feature_map.dim=8,16,24 --grid finetune.lr=1e-3,2e-3
  linearize sweep quickstart --grid 'attention.keep_softmax.layers=[],[0],[0, 1]' --set match.tokens=1M
the same command again goes on; runs/NAME.sweep/ gets results.csv, results.png and a folder a variant
"""

GENERATE_EPILOG = """\
examples:
  linearize generate runs/my -p "My fellow citizens" --max-new-tokens 100
  linearize generate runs/my -p "What is a tax?" --chat --temperature 0.7 --top-p 0.9 --seed 1
  cat book.txt | linearize generate runs/my -p - --save-state book.state     read once, answer nothing yet
  linearize generate runs/my --state book.state -p "Who is the hero? Answer:"   ask as often as you like
"""

EVAL_EPILOG = """\
examples:
  linearize eval runs/my --tasks hellaswag,piqa --limit 200
  linearize eval runs/my --tasks my_task --include-path my_tasks/ --output results.json
needs the extra: pip install "linearize[eval]"
"""

REPORT_EPILOG = """\
examples:
  linearize report runs/my                          its card again; with a second folder, side by side
  linearize convert runs/my/recipe.yaml --set attention.feature_map.name=equal_window --set output.folder=runs/baseline
  linearize report runs/my --baseline runs/baseline     beside a window of equal bytes, finetuned alike
"""

BENCH_EPILOG = """\
examples:
  linearize bench generation runs/my --against HuggingFaceTB/SmolLM2-135M --output bench
  linearize bench generation --shape llama-3.1-8b --cells 1k:1,32k:1,8k:max --steps 64
  linearize bench generation --shape llama-3.1-8b --cells 1k:1,1k:128 --steps 64 --sides converted --profile
  linearize bench generation runs/my --against MODEL --device cpu --prompts 1k,4k,16k --batches 1 --new 32 --made-up
  linearize bench speculative runs/my --against HuggingFaceTB/SmolLM2-135M --text book.txt
  linearize bench kernels --only decode
"""

PROCESS_EPILOG = """\
examples:
  linearize process runs/my reviews.jsonl out.jsonl --template "Review: {text}\\nThe sentiment is"
  linearize process runs/my rows.parquet out.jsonl --chat --template "Name the towns in: {text}" --batch 256
  linearize process runs/my stanfordnlp/imdb out.jsonl --split "test[:1000]" --template "Review: {text}\\nIt is"
  accelerate launch -m linearize.cli process runs/my rows.jsonl out.jsonl     on several GPUs
where layers or kv heads keep softmax, a row's memory grows with it: all prompts are counted first, or give --max-length
an output line is the row, its number as "row" (whatever that column was) and its answer; OUT.errors.jsonl holds those
that could not be answered; the same command again goes on where it stopped, other settings (OUT.settings.json) do not
"""

RECIPES_EPILOG = """\
examples:
  linearize recipes ls
  linearize recipes show quickstart
  linearize recipes cp llama-3.2-1b my.yaml
"""
