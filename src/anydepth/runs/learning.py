"""Learning of a sweep's points next to each other: each in a process of its own, or on a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anydepth.cores import num_cores
from anydepth.errors import RunError, UserError
from anydepth.methods.compose import load_recipe
from anydepth.runs.run import RECIPE, Runner, Say


def learn(folder: Path, home: Path) -> None:
    """Run the stages of a point that are not timed: search, fit, train and eval of the recipe in its folder.

    The recipe's relative paths begin at `home`.
    """
    os.chdir(home)
    runner = Runner(load_recipe(folder / RECIPE), folder, lambda text: print(text, file=sys.stderr, flush=True))
    for stage in (runner.search, runner.fit, runner.train, runner.evaluate):
        stage()


def learn_in_processes(folders: Mapping[str, Path], jobs: int, say: Say) -> dict[str, str]:
    """Learn `jobs` points at a time, each in a process that ends with this one. Return why points failed, by name."""
    processes = _Processes(jobs, say)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            reasons = dict(zip(folders, pool.map(processes.learn, folders, folders.values()), strict=True))
        except BaseException:  # After Ctrl-C no point may learn on in the background.
            processes.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: reason for name, reason in reasons.items() if reason is not None}


class _Processes:
    """The processes that learn, one for each thread that calls `learn`."""

    def __init__(self, jobs: int, say: Say) -> None:
        threads = os.environ.get("OMP_NUM_THREADS", str(max(num_cores() // jobs, 1)))
        self.environment, self.say = {**os.environ, "OMP_NUM_THREADS": threads}, say
        self.running: list[subprocess.Popen[bytes]] = []
        self.lock, self.stopping = threading.Lock(), threading.Event()

    def learn(self, name: str, folder: Path) -> str | None:
        """Wait for a point to learn in a process; return why it failed, or None."""
        log = folder / "sweep.log"
        with log.open("wb") as file:
            with self.lock:  # A process is started and listed as one step, so that `stop` ends every one.
                if self.stopping.is_set():
                    return "interrupted"
                self.say(f"{name}: learning, see {log}")
                command = [sys.executable, "-m", "anydepth.runs.learning", str(folder)]
                child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=self.environment)
                self.running.append(child)
            with child:
                child.wait()
            with self.lock:
                self.running.remove(child)
        return _reason(child.returncode, log)

    def stop(self) -> None:
        """End every process, and start no more."""
        with self.lock:
            self.stopping.set()
            for child in self.running:
                child.terminate()


def _reason(code: int, log: Path) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = log.read_text(errors="replace").splitlines() or [f"exit code {code}"]
    return lines[-1].strip()[:200]


def learn_on_ray(folders: Mapping[str, Path], jobs: int, say: Say) -> dict[str, str]:
    """Learn points on a Ray cluster, which ends the tasks of a driver that has ended. Return why points failed."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError('--backend ray needs Ray: pip install "anydepth[sweep]"') from error
    own = {name: value for name, value in os.environ.items() if name.startswith(("ANYDEPTH_", "HF_"))}
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": own})
    except ConnectionError as error:
        raise UserError("--backend ray found no cluster; start one (ray start --head), or set RAY_ADDRESS") from error
    try:
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cpus = max(min(sum(cores) // jobs, max(cores)), 1)  # A task runs on one machine.
        tasks = {}
        for name, folder in folders.items():
            on_gpu = load_recipe(folder / RECIPE).model.device.startswith("cuda")
            remote: Any = ray.remote(num_cpus=cpus, num_gpus=int(on_gpu), max_retries=1)(learn)
            tasks[remote.remote(folder.resolve(), Path.cwd())] = name
        failed, waiting = {}, list(tasks)
        while waiting:
            (done,), waiting = ray.wait(waiting)
            try:
                ray.get(done)
                say(f"{tasks[done]}: learned")
            except RayError as error:
                failed[tasks[done]] = str(error).strip().splitlines()[-1][:200]
        return failed
    finally:
        ray.shutdown()


def _end_with_parent() -> None:
    """End this process when the sweep ends, which closes the other end of standard input."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        learn(Path(sys.argv[1]), Path.cwd())
    except (UserError, RunError) as error:
        sys.exit(str(error))
