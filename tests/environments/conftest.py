"""Two processes that wait for work, and forgetting what was compiled."""

import os
from queue import Empty

import pytest
import torch
import torch.multiprocessing as mp
from workers import serve


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """Each test compiles afresh, and none leaves its limits or its cache to the next."""
    yield
    torch._dynamo.reset()


class Processes:
    """A gloo process group on this machine, started when first asked; afresh if one does not answer."""

    def __init__(self, folder, size):
        self.folder, self.size, self.started = folder, size, []

    def start(self):
        context = mp.get_context("spawn")
        meeting_point = f"file://{self.folder}/meeting-{os.urandom(4).hex()}"
        self.answers = context.Queue()
        self.requests = [context.Queue() for _ in range(self.size)]
        for rank, requests in enumerate(self.requests):
            arguments = (rank, self.size, meeting_point, requests, self.answers)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            self.started.append(process)

    def stop(self):
        for requests in self.requests if self.started else []:
            requests.put(None)
        for process in self.started:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        self.started = []

    def __call__(self, method, **arguments):
        """The results of ``Rank.method(**arguments)`` in the order of the ranks."""
        if not self.started:
            self.start()
        for requests in self.requests:
            requests.put((method, arguments))
        results, errors = {}, {}
        while len(results) < self.size:
            try:
                rank, results[rank], error = self.answers.get(timeout=20 if errors else 90)
            except Empty:
                self.stop()
                errors[None] = f"only ranks {sorted(results)} of {self.size} answered"
                break
            if error is not None:
                errors[rank] = error
        if errors:
            pytest.fail(f"{method}({arguments}): {next(iter(errors.values()))}", pytrace=False)
        return [results[rank] for rank in range(self.size)]


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    processes = Processes(tmp_path_factory.mktemp("processes"), size=2)
    yield processes
    processes.stop()
