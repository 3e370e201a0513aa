"""Which part of the inputs is this program's; what words for inputs stand for is tested with what reads them."""

import pytest

from knife.errors import SettingsError
from knife.inputs import ALL, Shard, shard_of

ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "5",
}
STEP = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}
RANKS = {"RANK": "0", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("text", "inputs", "environ", "wanted"),
    [
        (None, 9, ARRAY, ALL), ("2/8", 9, ARRAY, Shard(2, 8)), ("1/1", 9, RANKS, ALL), ("8/8", 1, {}, Shard(8, 8)),
        ("auto", 9, {}, ALL), ("auto", 9, ARRAY, Shard(3, 5, "SLURM job array")),
        ("auto", 9, RANKS, Shard(1, 4, "torchrun")),
        ("auto", 9, RANKS | ARRAY, Shard(3, 5, "SLURM job array")), ("auto", 1, ARRAY | RANKS, ALL),
        ("auto", 9, {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}, Shard(1, 2, "SLURM job array")),
        ("auto", 9, STEP, Shard(3, 4, "SLURM step")), ("auto", 9, STEP | RANKS, Shard(1, 4, "torchrun")),
        ("auto", 9, STEP | ARRAY, Shard(3, 5, "SLURM job array")), ("auto", 1, STEP, ALL),
        ("auto", 9, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, ALL),
        ("auto", 9, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ALL),  # a script of sbatch, not a step of srun
        ("auto", 9, {"RANK": "x", "WORLD_SIZE": "4"}, ALL), ("auto", 9, {"SLURM_ARRAY_TASK_ID": "7"}, ALL),
    ],
)  # fmt: skip
def test_which_part_is_meant(text, inputs, environ, wanted):
    assert shard_of(text, inputs, environ) == wanted


@pytest.mark.parametrize("text", ["", "0/3", "4/3", "1/0", "1", "1/2/3", "-1/3", "a/b", "1 / 2", "1/9999999"])
def test_parts_that_there_are_none_of(text):
    with pytest.raises(SettingsError, match=r"--shard .*: give which of how many parts, from 1 on, such as 2/8"):
        shard_of(text, 9, {})


def test_tasks_that_are_not_numbered_evenly_are_refused():
    listed = {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "3"}  # --array=0,5,9
    with pytest.raises(SettingsError, match="--shard: the SLURM job array calls this 10/3, and there is no such part"):
        shard_of("auto", 9, listed)


def test_a_shard_is_told_as_it_is_given():
    assert str(Shard(2, 8)) == "2/8"
