"""Has the answer of a model service kept while it streams by, where policy says so.

A filter of Envoy tells the gatekeeper each piece of an answer, in numbered parts of :data:`PIECE_BYTES` or more, without waiting
for it, so that a stream is not slowed; at the end it says how many there were and waits for that alone, five seconds at most. It
stands behind the filter that takes credentials out of answers, so they never get here. When the client goes away before the end,
what was told until then is kept: at most the last :data:`PIECE_BYTES` are missing.
"""

from __future__ import annotations

from saw.gateway.envoy_parts import RECORD_HEADER, RECORD_SEAT

ID_HEADER, PIECE_HEADER, PIECES_HEADER, STATUS_HEADER = RECORD_HEADER, "x-saw-piece", "x-saw-pieces", "x-saw-status"
"""What the filter tells: the record, the number of a piece or how many there were, and the status."""
PIECE_BYTES = 1024
"""Fewest bytes of a piece that is not the last one."""
MOST_BYTES = 65536
"""Most bytes of a piece."""

_SOURCE = """
local GATEKEEPER = "GATEKEEPER_NAME"

local function tell(handle, id, body, headers, waits)
  headers[":method"], headers[":path"], headers[":authority"] = "POST", "/", "gatekeeper"
  headers["x-saw-listener"], headers["RECORD_HEADER"] = "RECORD_SEAT", id
  if waits then
    handle:httpCall(GATEKEEPER, headers, body, 5000)
  else
    handle:httpCall(GATEKEEPER, headers, body, 5000, true)
  end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local id = headers:get("RECORD_HEADER")
  headers:remove("RECORD_HEADER")
  if id == nil then return end
  headers:remove("accept-encoding")
  handle:streamInfo():dynamicMetadata():set("saw.record", "id", id)
end

function envoy_on_response(handle)
  local record = handle:streamInfo():dynamicMetadata():get("saw.record")
  if record == nil then return end
  local id, status = record["id"], handle:headers():get(":status") or "0"
  local pieces, held = 0, ""
  local function send(all)
    while #held >= PIECE_BYTES or (all and #held > 0) do
      tell(handle, id, string.sub(held, 1, MOST_BYTES), {["PIECE_NUMBER"] = tostring(pieces)}, false)
      held, pieces = string.sub(held, MOST_BYTES + 1), pieces + 1
    end
  end
  for chunk in handle:bodyChunks() do
    local size = chunk:length()
    if size > 0 then
      held = held .. chunk:getBytes(0, size)
      send(false)
    end
  end
  send(true)
  tell(handle, id, "", {["PIECES_NUMBER"] = tostring(pieces), ["STATUS_HEADER"] = status}, true)
end
"""


def record_filter(gatekeeper: str = "gatekeeper") -> str:
    """Return the source of the filter; ``gatekeeper`` is the cluster that is told."""
    source = _SOURCE
    for name, value in (
        ("GATEKEEPER_NAME", gatekeeper),
        ("RECORD_HEADER", RECORD_HEADER),
        ("RECORD_SEAT", RECORD_SEAT),
        ("PIECES_NUMBER", PIECES_HEADER),
        ("PIECE_NUMBER", PIECE_HEADER),
        ("STATUS_HEADER", STATUS_HEADER),
        ("PIECE_BYTES", str(PIECE_BYTES)),
        ("MOST_BYTES", str(MOST_BYTES)),
    ):
        source = source.replace(name, value)
    return source
