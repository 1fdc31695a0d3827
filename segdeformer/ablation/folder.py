"""The folder of an ablation: what it holds, that it belongs to these settings, and to one process at a time.

plan.json                  the settings; a repeated command must have the same
rows/ROW/recipe.toml       the row's recipe
rows/ROW/seed-0/           a run folder, as `segdeformer train` makes it, and `images.npz`
rows/ROW/seed-0.log        what the run printed
ablation.json  table.md  table.csv  classes.csv  plot.png
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from segdeformer.ablation.plan import Plan
from segdeformer.config import recipe_toml, validate_recipe
from segdeformer.config.changes import differences
from segdeformer.errors import UserError
from segdeformer.files import write_json, write_text

PLAN, LOCK = "plan.json", "lock"
ORPHANS_SAVE_S = 120.0


def settle(plan: Plan) -> None:
    """Write the plan and its recipes into its folder, or see that the one there is the same.

    Seeds may be added. Raises `UserError` that names the first setting that differs.
    """
    folder, path = plan.folder, plan.folder / PLAN
    if path.exists():
        _check_same(path, plan)
    elif any((folder / "rows").glob("*")):
        raise UserError(f"{folder} has rows, but no {PLAN} that says whose; choose another --out")
    for row in plan.rows:
        write_text(plan.recipe_path(row), recipe_toml(row.recipe))
    write_json(path, _values(plan))


def _values(plan: Plan) -> dict[str, Any]:
    return {
        "seeds": list(plan.seeds),
        "rows": {
            row.name: {"over": row.over, "recipe": row.recipe.model_dump(mode="json", exclude_none=True)}
            for row in plan.rows
        },
    }


def _check_same(path: Path, plan: Plan) -> None:
    try:
        before = json.loads(path.read_text("utf-8"))
        for name, row in before["rows"].items():
            # a version with more settings has their defaults in the recipes of before
            recipe = validate_recipe(row["recipe"], f"{path}: row `{name}`")
            row["recipe"] = recipe.model_dump(mode="json", exclude_none=True)
        seeds = before["seeds"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({error}); choose another --out") from None
    now = _values(plan)
    names = [f"the rows {', '.join(f'`{name}`' for name in values['rows'])}" for values in (before, now)]
    if names[0] != names[1]:
        raise _other(path, *names)
    for name, row in now["rows"].items():
        for key, (there, here) in differences(before["rows"][name], row).items():
            setting = key.removeprefix("recipe.")
            raise _other(path, f"`{setting}` {there} in row `{name}`", str(here))
    if not set(seeds) <= set(plan.seeds):
        raise _other(path, *(f"the seeds {', '.join(map(str, some))}" for some in (seeds, plan.seeds)))


def _other(path: Path, there: str, here: str) -> UserError:
    return UserError(
        f"{path.parent} holds an ablation with other settings: it has {there}, the command {here}; "
        "repeat its settings (seeds may be added), or choose another --out"
    )


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Own the folder; gives the lock's file descriptor, for training processes to hold it too.

    So it is free only when they have ended, also after their parent was killed; then this waits for them.
    Raises `UserError` when another `ablate` works there.
    """
    try:
        import fcntl
    except ImportError:
        raise UserError("ablate needs Linux or macOS; on Windows it runs in WSL") from None
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    with file:
        deadline: float | None = None
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip()
                if deadline is None and not _is_alive(owner):
                    say("waiting for the training processes of the command that was killed to save and end")
                    deadline = time.monotonic() + ORPHANS_SAVE_S
                if deadline is None or time.monotonic() > deadline:
                    raise UserError(
                        f"another `segdeformer ablate` (process {owner}) or its training processes work in "
                        f"{folder}; wait for them, or choose another --out"
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OSError):
        return False
    return True
