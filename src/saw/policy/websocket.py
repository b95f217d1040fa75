"""WebSocket (RFC 6455) in policy: what opening one is called, which messages a client may send, and how Envoy keeps to it.

Opening a WebSocket is a GET that asks to switch protocols; it is decided like any call. What may be sent afterwards is
decided at the same time: nothing (``none``), text messages (``text``) or text and binary messages (``any``). Both rings hold
the client to that, frame by frame, with :data:`FRAME_FILTER` in Envoy. What the service sends is not bounded.
"""

from __future__ import annotations

from typing import Literal

Message = Literal["", "text", "binary"]
PROTOCOL = "websocket"

OPEN = "WEBSOCKET"
"""Stands for the method of a request that opens a WebSocket, where methods are compared. No client can send a call of it."""
TEXT = "WEBSOCKET_TEXT"
"""The method that rules use for text messages of the client."""
BINARY = "WEBSOCKET_BINARY"
"""Stands for binary messages of the client; only ``*`` and ``full`` allow them."""
STREAM_METHODS = frozenset({OPEN, TEXT, BINARY})

MESSAGES: dict[Message, str] = {"": OPEN, "text": TEXT, "binary": BINARY}
"""What is asked about a WebSocket: to open it, or to send a message of a kind."""
FRAMES = ("none", "text", "any")
"""What the client may send, from least to most."""

ACCESS = {
    "read-only": frozenset({OPEN}),
    "read-write": frozenset({OPEN, TEXT}),
    "full": STREAM_METHODS,
}
RULE_METHODS = {"GET": frozenset({OPEN}), TEXT: frozenset({TEXT}), "*": STREAM_METHODS}
"""What each method that a rule of a ``websocket`` endpoint may name stands for."""

FRAMES_HEADER = "x-saw-frames"
"""The header in which a ring's decision tells its own Envoy what the client may send. It never leaves that Envoy."""


def frames_of(sendable: frozenset[str]) -> str:
    """Return the word for the kinds of messages (:data:`TEXT`, :data:`BINARY`) that a client may send."""
    if BINARY in sendable:
        return "any"
    return "text" if TEXT in sendable else "none"


def permits(frames: str, message: str) -> bool:
    """Return whether ``frames`` lets a client send a ``message`` of this kind (``text``, ``binary``; empty: none)."""
    return not message or frames == "any" or (frames == "text" and message == "text")


# Frames are judged by their headers alone. The first one that may not pass is replaced by a Close frame (1008, policy
# violation, with a mask of zeros); nothing of the client passes after it, and the service ends the connection. Extensions
# are not negotiated, so a reserved bit, and with it every byte that could begin an HTTP request, ends it as well. Over HTTP/2
# (RFC 8441) a 200 means that the WebSocket is open, so the 200 of a service that did not open it must not be taken for that.
FRAME_FILTER = f"""
local CLOSE = string.char(0x88, 0x82, 0, 0, 0, 0, 0x03, 0xf0)
local LONGEST = 2 ^ 53

local function reader(frames)
  local head, payload, fragmented = "", 0, false

  local function may_pass(first, second)
    local kind, final = first % 16, first >= 128
    if math.floor(first / 16) % 8 ~= 0 or second < 128 then return false end
    if kind >= 8 then return kind <= 10 and final and second <= 128 + 125 end
    if kind == 0 then
      if not fragmented then return false end
    elseif fragmented or not ((kind == 1 and frames ~= "none") or (kind == 2 and frames == "any")) then
      return false
    end
    fragmented = not final
    return true
  end

  return function(data)
    local at, size = 1, #data
    if payload >= size then
      payload = payload - size
      return data, false
    end
    local passed = string.sub(data, 1, payload)
    data = head .. string.sub(data, payload + 1)
    head, payload, size = "", 0, #data
    while size - at + 1 >= 2 do
      local first, second = string.byte(data, at, at + 1)
      local length, wide = second % 128, 0
      if length == 126 then wide = 2 elseif length == 127 then wide = 8 end
      local enough = size - at + 1 >= 6 + wide
      if enough and wide > 0 then
        length = 0
        for place = at + 2, at + 1 + wide do length = length * 256 + string.byte(data, place) end
      end
      if not enough then break end
      if length >= LONGEST or not may_pass(first, second) then
        return passed .. string.sub(data, 1, at - 1) .. CLOSE, true
      end
      at = at + 6 + wide + length
    end
    if at > size then
      payload = at - size - 1
      return passed .. data, false
    end
    head = string.sub(data, at)
    return passed .. string.sub(data, 1, at - 1), false
  end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local frames = headers:get("{FRAMES_HEADER}")
  headers:remove("{FRAMES_HEADER}")
  if headers:get("upgrade") == nil then return end
  if frames ~= "none" and frames ~= "text" and frames ~= "any" then
    handle:respond({{[":status"] = "503"}}, "")
    return
  end
  handle:streamInfo():dynamicMetadata():set("saw.websocket", "asked", true)
  headers:remove("sec-websocket-extensions")
  local read, ended = reader(frames), false
  for chunk in handle:bodyChunks() do
    local size = chunk:length()
    if ended then
      chunk:setBytes("")
    elseif size > 0 then
      local sent
      sent, ended = read(chunk:getBytes(0, size))
      chunk:setBytes(sent)
    end
  end
end

function envoy_on_response(handle)
  local known = handle:streamInfo():dynamicMetadata():get("saw.websocket")
  local status = handle:headers():get(":status")
  if known ~= nil and known["asked"] and status ~= "101" and string.sub(status, 1, 1) == "2" then
    handle:headers():replace(":status", "502")
  end
end
"""
