#!/bin/sh
# The forced command of every SSH session: a command given by the client, or the persistent terminal, always inside the
# sandbox. Nothing of the client's is interpreted out here.
run="${0%/*}/saw-run"
if [ -n "${SSH_ORIGINAL_COMMAND:-}" ]; then
  exec "$run" -- /bin/bash -c "$SSH_ORIGINAL_COMMAND"
fi
exec "$run" --attach
