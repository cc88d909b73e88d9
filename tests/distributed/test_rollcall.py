"""The roll: all go on together, or all are told the same reason why not."""

import re
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from launch import free_port

from vlora_jax.distributed import rollcall
from vlora_jax.distributed.watch import answers
from vlora_jax.errors import ConfigError


def outcomes(count: int, *others: tuple[int, int], seconds: float = 10) -> list[str]:
    """What process 0 and those others, each `(process, count)`, come back with: "" or an error."""
    address = f"localhost:{free_port()}"

    def told(function, *arguments) -> str:
        try:
            function(address, *arguments, seconds)
        except ConfigError as error:
            return str(error).replace(address, "ADDRESS")
        return ""

    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(told, rollcall.answer, *each) for each in others]
        calls.insert(0, pool.submit(told, rollcall.call, count))
        return [each.result() for each in calls]


def called() -> tuple[int, Future]:
    """The port where process 0 of 3 calls the roll, listening already, and what will come of it."""
    port = free_port()
    roll = ThreadPoolExecutor(1).submit(rollcall.call, f"localhost:{port}", 3, 20)
    while not answers(f"localhost:{port}"):
        time.sleep(0.01)
    return port, roll


def test_all_go_on_when_all_are_there():
    assert outcomes(4, (3, 4), (1, 4), (2, 4)) == [""] * 4
    assert outcomes(1) == [""]


def test_who_is_missing_is_told_to_all_that_are_there():
    assert outcomes(4, (2, 4), seconds=1) == ["processes 1, 3 of 4 did not come to ADDRESS within 1 s"] * 2
    assert rollcall.named(range(3, 500)) == "processes 3, 4, 5, 6, 7, 8, 9, 10 and 489 more"


def test_processes_that_contradict_each_other_are_told_so_at_once():
    assert outcomes(4, (2, 4), (2, 4)) == ["two processes were told that they are process 2"] * 3
    assert outcomes(4, (0, 4)) == ["two processes were told that they are process 0"] * 2
    assert outcomes(4, (1, 3)) == ["process 1 was told of 3 processes, process 0 of 4"] * 2


def test_one_that_leaves_is_missing_and_may_come_again():
    """And who only looks whether someone is there, or says something else, is none of them."""
    port, roll = called()
    address = f"localhost:{port}"
    dial = lambda: socket.create_connection(("localhost", port))
    with dial() as stranger, dial() as one:
        stranger.sendall(b"GET / HTTP/1.1\r\n")
        one.sendall(b"[1, 3]\n")
        time.sleep(0.1)
    threads = [threading.Thread(target=rollcall.answer, args=(address, process, 3, 20)) for process in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    roll.result(20)


def test_one_that_left_is_not_counted_when_the_last_comes():
    """Process 1 hangs up and comes again after process 2, and nothing in between gives occasion to notice it."""
    port, roll = called()
    address = f"localhost:{port}"
    with socket.create_connection(("localhost", port)) as one:
        one.sendall(b"[1, 3]\n")
    with ThreadPoolExecutor() as pool:
        two = pool.submit(rollcall.answer, address, 2, 3, 20)
        time.sleep(0.1)  # process 2 is heard, and the dead connection of process 1 is there still
        pool.submit(rollcall.answer, address, 1, 3, 20).result()
        two.result()
    roll.result(20)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        address = f"localhost:{server.getsockname()[1]}"
        message = f"process 0 cannot listen at JAX_COORDINATOR_ADDRESS {address}: Address already in use"
        with pytest.raises(ConfigError, match=re.escape(message)):
            rollcall.call(address, 2, 1)
