"""Check every network of the zoo, one process each.

python -m tests.zoo.run
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from tests.zoo.catalogue import Network, catalogue
from tests.zoo.checks import CHECKS
from tests.zoo.results import RESULTS, append_result, read_results

SECONDS = 900
# In weights; larger networks need more memory and time than they tell.
LARGEST = float("inf") if os.environ.get("ZOO_LARGE") else 60e6


def check(network: Network, name: str) -> dict[str, Any]:
    """Run one check, and say how it ended."""
    start = time.perf_counter()
    result: dict[str, Any] = {"status": "passed"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result |= CHECKS[name](network)
        except (ConfigurationError, PruningError) as error:
            result = {"status": "refused", "reason": str(error)}
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            result = {
                "status": "failed",
                "reason": cause,
                "trace": traceback.format_exc(),
            }
    own = {str(w.message) for w in caught if "lightning_woodfisher" in w.filename}
    return {
        "family": network.family,
        "network": network.name,
        "check": name,
        **result,
        "warnings": sorted(own),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _send(connection: Connection, network: Network, name: str) -> None:
    torch.set_num_threads(1)
    connection.send(check(network, name))


def check_apart(network: Network, name: str) -> dict[str, Any]:
    """Run one check in a process of its own, which may die."""
    # Once, and not in each process.
    importlib.import_module(network.family.split()[0])
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, network, name))
    process.start()
    sender.close()
    reason = f"it took more than {SECONDS} seconds"
    try:
        if receiver.poll(SECONDS):
            found: dict[str, Any] = receiver.recv()
            return found
    except EOFError:
        reason = "its process died"
    finally:
        process.kill()
        process.join()
    return {
        "family": network.family,
        "network": network.name,
        "check": name,
        "status": "failed",
        "reason": reason,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression on family/name")
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=CHECKS)
    parser.add_argument(
        "--again", action="store_true", help="repeat what has not passed"
    )
    parser.add_argument("--largest", type=float, default=LARGEST, help="in weights")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Ends the process of the check, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for network in catalogue():
        place = f"{network.family}/{network.name}"
        if network.weights > options.largest or not re.search(options.only, place):
            continue
        for name in options.checks:
            known = read_results(options.results).get(
                (network.family, network.name, name), {}
            )
            if known and (known["status"] == "passed" or not options.again):
                continue
            result = check_apart(network, name)
            append_result(options.results, result)
            reason = result.get("reason", "")[:150]
            print(f"{place} {name}: {result['status']} {reason}", flush=True)


if __name__ == "__main__":
    main()
