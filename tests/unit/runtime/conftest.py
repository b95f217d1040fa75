"""Settings of the runtime's tests."""

from __future__ import annotations

import os

# gRPC would look into every fork of this process, and write about it to the standard error of whatever test forks.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
