"""How the affine context should start: trainings of many starts on one setting, over seeds and images.

python -m benchmarks.study frozen --data folder:CAMVID --classes docs/camvid/classes.toml
    --weights VIT.safetensors --variants "fusion only" small unit --seeds 0 1 2

Stopped, the same command goes on; what is done is not done again. Ends with a table of all that is in the
setting's folder, and writes it, with each run's scores, beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.study.runs import Job, Setting, run, variant_names
from benchmarks.study.table import write_table
from segdeformer.cores import num_cores
from segdeformer.errors import UserError

HERE = Path(__file__).parent
CAMVID = HERE.parents[1] / "docs" / "camvid" / "recipe.toml"  # MiT-B0 from scratch
RECIPES = {"frozen": str(HERE / "frozen.toml"), "camvid": str(CAMVID), "landcover": "landcover"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=RECIPES)
    parser.add_argument("--variants", nargs="*", default=["fusion only", "small", "conv_bn_relu", "unit"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--data", help="as `segdeformer train --data`")
    parser.add_argument("--classes")
    parser.add_argument("--weights", help="of the encoder")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--processes", type=int, default=num_cores(), help="trainings at once")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    unknown = [name for name in args.variants if name not in variant_names()]
    if unknown:
        parser.error(f"no variant {unknown[0]!r}; there are: {', '.join(variant_names())}")
    name = args.setting if args.iterations is None else f"{args.setting}-{args.iterations}"
    recipe = RECIPES[args.setting]
    setting = Setting(name, recipe, args.data, args.classes, args.weights, args.iterations)
    jobs = [Job(setting, variant, seed, args.out) for seed in args.seeds for variant in args.variants]
    waiting = [job for job in jobs if not job.is_done]
    print(f"{name}: {len(jobs) - len(waiting)} of {len(jobs)} trainings are done", flush=True)
    processes = max(1, min(args.processes, len(waiting)))
    threads = max(1, num_cores() // processes)
    spawn = multiprocessing.get_context("spawn")
    # A process for each training: what one leaves behind does not reach the next.
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(run, job, threads) for job in waiting]):
            print(done.result(), flush=True)
    print(write_table(args.out / name))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
