"""Processes that work off tasks: whatever one does, the others' results come and it is named."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import deque
from pathlib import Path

import faulty
import pytest

from segdeformer.kernels.tuning import crew as crew_module
from segdeformer.kernels.tuning.crew import Crew, Over, stage


def run(tasks, work=faulty.obey, *, patience_s=2.0, **options):
    with Crew(patience_s=patience_s) as crew:
        return list(crew.run(work, deque(tasks), **options))


def is_alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_each_way_to_go_wrong_costs_one_task_and_is_named():
    tasks = [("fine", fault, "never") for fault in faulty.FAULTS] + [("fine",)]
    news = run(tasks)
    overs = {task[1]: message for task, message in news if isinstance(message, Over) and len(task) > 1}
    assert overs == {
        "raises": Over("raises", "IndexError: list index out of range"),
        "is killed": Over("is killed", "its process was ended by SIGKILL"),
        "crashes": Over("crashes", "its process was ended by SIGSEGV"),
        "exits": Over("exits", "its process ended with code 3"),
        "hangs": Over("hangs", "hangs: no progress for 2 s"),
    }
    results = [message for _, message in news if isinstance(message, str)]
    assert results == ["fine"] * len(tasks)
    assert news[-1] == (("fine",), Over())
    pids = [message for _, message in news if isinstance(message, int)]
    assert len(set(pids)) == len(pids)  # a process that went wrong works on nothing else
    assert not any(is_alive(pid) for pid in pids)


def test_good_tasks_share_a_process_and_a_closed_crew_starts_anew():
    with Crew() as crew:
        pids = [
            message
            for _ in range(2)
            for _, message in crew.run(faulty.obey, deque([(), ()]))
            if isinstance(message, int)
        ]
        assert len(set(pids)) == 1
        crew.close()
        assert next(crew.run(faulty.obey, deque([()])))[1] != pids[0]


def test_several_work_at_once_and_only_the_hanging_one_is_lost():
    tasks = [("hangs",), ("a",), ("b",), ("c",)]
    news = run(tasks, workers=2)
    lost = [task for task, message in news if isinstance(message, Over) and message.lost]
    assert lost == [("hangs",)]
    assert {message for _, message in news if isinstance(message, str)} == {"a", "b", "c"}
    assert [task for task, message in news if isinstance(message, Over)][-1] == ("hangs",)


def test_a_task_may_take_long_as_long_as_it_says_so():
    assert run([0.6], faulty.slowly, patience_s=1.2) == [(0.6, "done"), (0.6, Over())]


def test_what_is_left_of_a_lost_task_can_be_put_back():
    tasks = deque([("a", "exits", "b")])
    seen = []
    with Crew() as crew:
        for task, message in crew.run(faulty.obey, tasks):
            seen.append(message)
            if isinstance(message, Over) and message.lost:
                tasks.appendleft(task[task.index(message.stage) + 1 :])
    assert [message for message in seen if isinstance(message, str)] == ["a", "b"]


def test_a_machine_on_which_nothing_works_is_left_alone(monkeypatch):
    monkeypatch.setattr(crew_module, "MOST_LOSSES", 2)
    tasks = deque([("raises",)] * 4)
    with Crew() as crew:
        news = list(crew.run(fails_at_once, tasks))
    assert len(news) == 2
    assert len(tasks) == 2


def fails_at_once(task):
    raise RuntimeError("no GPU any more")
    yield


def test_after_the_deadline_nothing_begins_and_nobody_is_blamed(monkeypatch):
    monkeypatch.setattr(crew_module, "GRACE_S", 0.0)
    tasks = deque([("hangs",), ("a",)])
    with Crew(patience_s=100) as crew:
        news = list(crew.run(faulty.obey, tasks, deadline=time.monotonic() + 5))
    assert all(isinstance(message, int) for _, message in news)
    assert list(tasks) == [("a",)]


def test_what_a_lost_process_started_ends_with_it():
    (_, child), (_, over) = run([()], faulty.with_child, patience_s=1.0)
    assert over.stage == "waits"
    for _ in range(100):  # a killed process is gone soon, not at once
        if not is_alive(child):
            return
        time.sleep(0.1)
    raise AssertionError(f"{child} is still there")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whoever_waits_for_a_crew_takes_it_along(tmp_path, number):
    script = tmp_path / "waits.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from collections import deque
            import faulty
            from segdeformer.kernels.tuning.crew import Crew
            if __name__ == "__main__":
                with Crew(patience_s=1000) as crew:
                    for _, message in crew.run(faulty.obey, deque([("hangs",)])):
                        print(message, flush=True)
            """
        )
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    worker = int(process.stdout.readline())
    assert is_alive(worker)
    os.killpg(process.pid, number)  # as a terminal does
    process.wait(30)
    for _ in range(100):
        if not is_alive(worker):
            break
        time.sleep(0.1)
    assert not is_alive(worker)
    assert process.stderr.read().count("Traceback") == (number == signal.SIGINT)


def test_outside_of_a_crew_a_stage_is_noted_and_told_to_nobody():
    stage("anything", 7.0)
    assert crew_module._voice.stage == crew_module.Stage("anything", 7.0)
    assert crew_module._voice.connection is None
