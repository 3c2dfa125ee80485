"""What several processes that train together refuse, and how a signal ends training."""

import os
import signal
from types import SimpleNamespace

import pytest

pytest.importorskip("datasets", reason="the command line loads data with it")

from qlora_native.cli.errors import InputError
from qlora_native.cli.parallel import OPTIMIZER_SHARDS, Ranks, check_run
from qlora_native.cli.trainer import StopOnSignal


class OfSeveral(Ranks):
    """One of several ranks that need no group."""

    def __init__(self, size):
        self.rank, self.size = 0, size


def checkpoint(folder, ranks, sharded=False):
    folder.mkdir()
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{i}.pth" for i in range(ranks)]
    for name in names:
        (folder / name).touch()
    if sharded:
        (folder / OPTIMIZER_SHARDS).mkdir()
    return folder


def test_a_run_goes_on_with_as_many_ranks_as_it_had(tmp_path):
    for before in (1, 2, 3):
        resumed = checkpoint(tmp_path / f"checkpoint-{before}", before, sharded=before > 1)
        check_run(OfSeveral(before), before > 1, "paged_adamw", resumed)
        with pytest.raises(InputError, match=rf"checkpoint-{before} is of {before} processes.* 4"):
            check_run(OfSeveral(4), False, "paged_adamw", resumed)


def test_whole_states_are_not_split(tmp_path):
    resumed = checkpoint(tmp_path / "checkpoint-5", 2)
    check_run(OfSeveral(2), False, "paged_adamw", resumed)
    with pytest.raises(InputError, match="checkpoint-5 was written without --fsdp"):
        check_run(OfSeveral(2), True, "paged_adamw", resumed)


def test_optimizers_that_save_no_shards_are_refused():
    check_run(OfSeveral(2), False, "adamw_torch", None)
    check_run(OfSeveral(2), True, "adamw8bit", None)
    with pytest.raises(InputError, match="--optim adamw_torch"):
        check_run(OfSeveral(2), True, "adamw_torch", None)


def test_a_signal_while_stderr_is_written_is_announced_after_the_step():
    announced = []

    def announce():
        announced.append(True)
        if len(announced) == 1:
            raise RuntimeError("reentrant call")

    control = SimpleNamespace(should_save=False, should_training_stop=False)
    with StopOnSignal(announce, OfSeveral(1)) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.on_step_end(None, None, control)
    assert len(announced) == 2
    assert control.should_save and control.should_training_stop
