"""Several workers that do one job together, as ranks: on this machine, on others, or both.

Each rank is a worker with torch.distributed's variables in its environment, by which the ranks find each other. All get
the same job, each with an output folder of its own; rank 0's is the result, and its events are passed on. A rank that
fails ends the others: they would wait for it for ever.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coldpress.errors import ColdpressError, Interrupted, StepError
from coldpress.events import Event, Sink
from coldpress.hardware import detect
from coldpress.systems.hosts import Host, Place, places
from coldpress.systems.job import Job
from coldpress.systems.local import STOP_GRACE_SECONDS, Worker

__all__ = ["WorkerGroup", "rank_environment"]

GRACE_SECONDS = 10.0
"""After the error of a rank, how long rank 0 may take to say what it thinks of the same: it knows what was kept."""
NOTICE_SECONDS = 2.0
"""After an error of rank 0, how long the death of another one may take to be noticed: it would be the reason."""

Answer = tuple[int, Event | dict[str, Any] | ColdpressError]


class WorkerGroup:
    """Ranks of one job. Not thread-safe."""

    def __init__(
        self,
        module: str,
        *,
        hosts: Sequence[Host],
        device: str,
        preload: tuple[str, ...],
        log: Path,
    ) -> None:
        """Start them. Each writes a log beside `log`."""
        self._places = places(hosts)
        self._workers: list[Worker] = []
        self._threads: list[threading.Thread] = []
        port = _free_port()
        try:
            for place in self._places:
                self._workers.append(
                    Worker(
                        module,
                        preload=preload,
                        log=log.with_name(f"{log.stem}-rank{place.rank}{log.suffix}"),
                        environment=rank_environment(place, hosts, device, port),
                        host=None if place.host.here else place.host,
                    )
                )
        except OSError:
            self.close()
            raise

    @property
    def ranks(self) -> int:
        return len(self._places)

    def perform(self, jobs: Sequence[Job], emit: Sink, *, advice: Callable[[], str]) -> dict[str, Any]:
        """Run a job to its end; `jobs` has it once for each rank. Returns rank 0's result.

        Raises what the job raised. Where a process died, that is the error, and which it was; `advice` as in Worker.
        """
        answers: queue.Queue[Answer] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._listen, args=(rank, jobs[rank], answers, advice), daemon=True)
            for rank in range(self.ranks)
        ]
        for thread in self._threads:
            thread.start()
        results: dict[int, dict[str, Any]] = {}
        errors: dict[int, ColdpressError] = {}
        until: float | None = None
        while len(results) + len(errors) < self.ranks:
            try:
                rank, answer = answers.get(timeout=None if until is None else max(until - time.monotonic(), 0.0))
            except queue.Empty:
                break
            if isinstance(answer, ColdpressError):
                errors[rank] = answer
                until = time.monotonic() + (NOTICE_SECONDS if 0 in errors else GRACE_SECONDS)
                if self._died(rank):
                    break
            elif isinstance(answer, dict):
                results[rank] = answer
            else:
                emit(answer)
        if errors:
            error = self._reason(errors)
            saving = all(isinstance(one, Interrupted) for one in errors.values())
            self._end(STOP_GRACE_SECONDS if saving else 0.0)
            raise error
        return results[0]

    def _listen(self, rank: int, job: Job, answers: queue.Queue[Answer], advice: Callable[[], str]) -> None:
        """Put into `answers` what a rank says, its result or error last."""

        def heard(event: Event) -> None:
            if rank == 0:  # the others do the same
                answers.put((rank, event))

        last: dict[str, Any] | ColdpressError = StepError(f"the answers of {self._places[rank]} could not be read")
        try:
            last = self._workers[rank].perform(job, heard, advice=advice)
        except ColdpressError as error:
            last = error
        finally:
            answers.put((rank, last))

    def _died(self, rank: int) -> bool:
        return self._workers[rank].exit_code not in (None, 0)

    def _reason(self, errors: Mapping[int, ColdpressError]) -> ColdpressError:
        """Of several errors the one that the others follow from: a death, else what the first rank says."""
        dead = [rank for rank in errors if self._died(rank)]
        if not dead:
            return errors[min(errors)]
        error, tail = errors[dead[0]], self._workers[dead[0]].tail()
        message = f"{self._places[dead[0]]} of {self.ranks} is gone, and the others were ended: {error.message}"
        return type(error)(message + ("" if tail in error.message else tail), hint=error.hint)

    def _end(self, seconds: float) -> None:
        """Let all end by themselves for a while, then end them."""
        until = time.monotonic() + seconds
        for worker in self._workers:
            worker.wait(until - time.monotonic())
        for worker in self._workers:
            worker.kill()

    def stop(self) -> None:
        """Ask all to save and end, then make them end."""
        for worker in self._workers:
            worker.ask_to_stop()
        self._end(STOP_GRACE_SECONDS)
        self.close()

    def close(self) -> None:
        """End those that have no job, and what is left of the others."""
        for worker in self._workers:
            worker.hang_up()
        self._end(5.0)
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()


def rank_environment(place: Place, hosts: Sequence[Host], device: str, port: int) -> dict[str, str]:
    """torch.distributed's variables, and this rank's part of its machine."""
    alone = all(host.here for host in hosts)
    first = hosts[0]
    found = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(sum(host.slots for host in hosts)),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.host.slots),
        "MASTER_ADDR": "127.0.0.1" if alone else socket.gethostname() if first.here else first.address,
        "MASTER_PORT": str(port),
    }
    if device == "gpu":
        # Each process sees its own GPU alone, as the first: nothing in it can reach for another one's.
        own = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if place.host.here else []
        visible = own[place.local_rank] if place.local_rank < len(own) and own[0] else str(place.local_rank)
        return {**found, "CUDA_VISIBLE_DEVICES": visible, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    found["ACCELERATE_USE_CPU"] = "true"
    if place.host.here:
        threads = max(1, detect().threads // place.host.slots)
        found["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return found


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return int(taken.getsockname()[1])
