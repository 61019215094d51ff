"""The five files are imported from the repository's root; one thread, so that times and sums do not depend on cores.
Four whole runs that take long start at once, one behind the other, beside the tests that come before theirs."""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

torch.set_num_threads(1)

SMOKE = ["--preset", "smoke", "--recipe", "self_explore", "--rounds", "2", "--out", "runs/a"]
FORKING = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import loop                       # once: every child begins with torch imported
kills, wait = 0, 1.5
while True:
    child, start = os.fork(), time.time()
    if not child:
        os._exit(loop.main(sys.argv[2:]))
    done = code = 0
    while not done and time.time() < start + wait:
        time.sleep(0.01)
        done, code = os.waitpid(child, os.WNOHANG)
    if done:
        print(kills)
        sys.exit(code != 0)
    os.kill(child, 9)
    os.waitpid(child, 0)
    kills, wait = kills + 1, 1.6 * wait
"""
HONEST = """
import sys
sys.path.insert(0, sys.argv[1])
import loop
reward = loop.Homework.reward
def honest(self, question, text, answer):
    assert answer != "", "the answer of a synthesised question was looked up"
    return reward(self, question, text, answer)
loop.Homework.reward, loop.LEAST_AUC = honest, 0.0      # so small a run has no head worth listening to
sys.exit(loop.main(sys.argv[2:]))
"""
IMAGINE = ["--preset", "smoke", "--recipe", "alphallm", "--rounds", "2", "--base-steps", "20", "--keep", "0.01",
           "--rollouts", "1", "--max-tokens", "32", "--out", "r", "--base", "base"]
COMPARE = ["--preset", "smoke", "--compare", "sft,rft,outcome_dpo,mcts_dpo,combined",
           "--seeds", "1", "--out", "runs/c"]
COMMANDS = {"imagined_run": ["-c", HONEST, str(ROOT), *IMAGINE],
            "smoke": [str(ROOT / "loop.py"), *SMOKE],                   # a run left alone, and one killed and resumed
            "compared": [str(ROOT / "loop.py"), *COMPARE],
            "killed": ["-c", FORKING, str(ROOT), *SMOKE]}
RUNS, STARTED = {}, []            # fixture: (folder, event, [exit code, stdout, stderr]); processes


def pytest_collection_finish(session):
    """Start what the collected tests will ask for."""
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if not session.config.option.collectonly:
        RUNS.update((name, (Path(tempfile.mkdtemp(prefix=name)), threading.Event(), []))
                    for name in COMMANDS if name in wanted)
        threading.Thread(target=run_all, daemon=True).start()


def run_all():
    """One after the other: they must not take more than one core from the tests."""
    for name, (folder, over, result) in RUNS.items():
        process = subprocess.Popen([sys.executable, *COMMANDS[name]], cwd=folder, text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        STARTED.append(process)
        out, err = process.communicate()
        result += [process.returncode, out, err]
        over.set()


def finished(name):
    """(folder, what it printed) of a run beside the tests."""
    folder, over, result = RUNS[name]
    assert over.wait(300), f"the {name} run has not ended in five minutes"
    assert result[0] == 0, result[2][-2000:]
    return folder, result[1]


@pytest.fixture(scope="session")
def smoke():
    """A finished smoke run of self_explore (two rounds) in FOLDER/runs/a, and what it printed."""
    return finished("smoke")


@pytest.fixture(scope="session")
def killed():
    """The same, killed (kill -9) at growing times and begun again; printed: how often."""
    return finished("killed")


@pytest.fixture(scope="session")
def compared():
    """A finished comparison of five recipes in FOLDER/runs/c, what it printed, and its flags."""
    return *finished("compared"), COMPARE


@pytest.fixture(scope="session")
def imagined_run():
    """A finished smoke run of alphallm whose grader raised when asked about a question nobody has an answer to."""
    return finished("imagined_run")[0] / "r"


def pytest_sessionfinish(session):
    """Leave nothing behind, neither processes (they have children) nor folders."""
    for process in STARTED:
        if process.poll() is None and hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
    for folder, _, _ in RUNS.values():
        shutil.rmtree(folder, ignore_errors=True)
