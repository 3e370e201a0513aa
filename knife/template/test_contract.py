"""The contract that every task of knife keeps; run it with `pytest`."""

from knife.contract import check_task


def test_contract() -> None:
    check_task("$name")
