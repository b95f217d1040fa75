"""Kills a move of secrets at each of its steps on the file system, on a copy each, and prints what was left; run by a test.

Usage: move_killed.py CONFIG SCRATCH STRIDE, which kills at the first step and at each STRIDE further. It has one thread and
nothing open when it forks.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import msgspec

from saw.broker.clock import utc_now
from saw.broker.config import BrokerConfig, load_config
from saw.broker.secret_move import move_secrets
from saw.broker.secret_place import NAMES, folders, known_place, open_secrets
from saw.secrets.store import read_or_none

STEPS = frozenset({"os.rename", "os.link", "os.remove"})


def moved(config: BrokerConfig, kill_at: int) -> bool:
    """Move in a child that kills itself before its step ``kill_at``; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        done = 0

        def count(event: str, _arguments: object) -> None:
            nonlocal done
            if event in STEPS:
                done += 1
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        code = 1
        try:
            move_secrets(config, utc_now)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFEXITED(status)


def values(config: BrokerConfig, kind: str) -> dict[str, str]:
    store = open_secrets(config, kind)
    return {name: value.hex() for name in NAMES if (value := read_or_none(store, name)) is not None}


def main() -> None:
    original, scratch = load_config(sys.argv[1]), Path(sys.argv[2])
    source, target = known_place(original).provider, original.secrets.provider
    expected = values(original, source)
    kills, number, stride, done = [], 1, int(sys.argv[3]), False
    while not done:
        config = msgspec.structs.replace(original, state_dir=str(scratch / str(number)))
        shutil.copytree(original.state, config.state)
        done = moved(config, number)
        known = known_place(config)
        # What is said to hold the secrets holds them all, at every moment.
        assert values(config, known.provider) == expected, (number, known)
        assert known.provider == target or values(config, source) == expected, number
        again = move_secrets(config, utc_now)
        assert move_secrets(config, utc_now).copied == 0
        assert (values(config, target), values(config, source)) == (expected, {}), number
        assert known_place(config).leaving is None
        left = [str(path) for place in folders(config).values() for path in place.rglob(".*") if path.is_file()]
        assert left == [], number
        kills.append([known.provider, known.leaving, again.copied, again.removed])
        shutil.rmtree(config.state)
        number += stride
    print(json.dumps({"secrets": len(expected), "kills": kills}))


if __name__ == "__main__":
    main()
