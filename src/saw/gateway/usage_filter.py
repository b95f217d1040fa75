"""Finds in the answer of a model service what the call used, and has the gatekeeper settle it before the answer has ended.

A filter of Envoy reads the answer as it streams by and keeps only the ``usage`` objects: of a JSON answer the one at the top, of
server-sent events those of each event, and of its ``message`` or ``response``. A stream counts as whole once it has said that it
is over (``[DONE]``, ``message_stop``, ``response.completed`` and its like); the piece with these words waits for the gatekeeper,
so a client that reads them, or the end of a JSON answer, finds the call settled. When the client goes away before, nothing is
told and the reservation stands.
"""

from __future__ import annotations

from collections.abc import Sequence

from saw.gateway.envoy_parts import LOCAL_MARK, METER_HEADER, METER_SEAT

STATUS_HEADER, FLAGS_HEADER = "x-saw-status", "x-saw-flags"
WHOLE_HEADER, ENCODING_HEADER = "x-saw-whole", "x-saw-encoding"
"""What the filter tells: the status, Envoy's flags when Envoy answered itself, whether the answer is whole, its encoding."""
TOLD_HEADERS = (METER_HEADER, STATUS_HEADER, FLAGS_HEADER, WHOLE_HEADER, ENCODING_HEADER)
"""All of them in the order of :func:`saw.gateway.metering.read_told`."""
BETWEEN = b"\x00"
"""What stands between two ``usage`` objects in the body of what the filter tells."""
LONGEST_LINE = 4 * 1024 * 1024
"""A line of server-sent events that is longer is not looked into (bytes)."""
LONGEST_USAGE = 8192
"""A ``usage`` object that is longer is not told (bytes)."""

_SOURCE = """
local GATEKEEPERS = {NAMES}
local ENDS = {["message_stop"] = true, ["response.completed"] = true, ["response.incomplete"] = true,
  ["response.failed"] = true}

local function fresh()
  return {depth = 0, objects = {}, names = {}, key_next = false, inside = false, escaped = false, word = "", opened = false}
end

local function keep(found, text)
  text = string.match(text, "^%s*(.-)%s*$")
  if text == "null" or text == "" then return end
  if found.first == nil then found.first = text else found.last = text end
end

-- Take in one more piece of a JSON text.
local function feed(s, text, found)
  local at, from = 1, 1
  local function capture(upto)
    if s.captured == nil then return end
    s.captured = s.captured .. string.sub(text, from, upto)
    if #s.captured > LONGEST_USAGE then s.captured, found.bad = nil, true end
  end
  while true do
    if s.inside then
      if s.escaped then
        if at > #text then break end
        s.escaped, at = false, at + 1
      end
      local place = string.find(text, '["\\\\]', at)
      if s.key_next and #s.word < 64 then s.word = s.word .. string.sub(text, at, (place or #text + 1) - 1) end
      if place == nil then break end
      at = place + 1
      if string.sub(text, place, place) == '"' then
        s.inside = false
        if s.key_next then s.names[s.depth] = s.word end
      else
        s.escaped, s.word = true, s.word .. "?"
      end
    else
      local place = string.find(text, '["{}%[%],:]', at)
      if place == nil then break end
      at = place + 1
      local sign = string.sub(text, place, place)
      if sign == '"' then
        s.inside, s.word = true, ""
      elseif sign == "{" or sign == "[" then
        s.depth, s.opened = s.depth + 1, true
        s.objects[s.depth], s.names[s.depth], s.key_next = sign == "{", nil, sign == "{"
      elseif sign == ":" then
        s.key_next = false
        local d, names = s.depth, s.names
        local ours = d == 1 or (d == 2 and (names[1] == "message" or names[1] == "response"))
        if s.captured == nil and ours and s.objects[d] and names[d] == "usage" then
          s.captured, s.level, from = "", d, at
        end
      else
        if s.captured ~= nil and s.depth == s.level then
          capture(place - 1)
          if s.captured ~= nil then keep(found, s.captured) end
          s.captured = nil
        end
        if sign == "," then
          s.key_next = s.objects[s.depth] == true
        else
          s.depth, s.key_next = s.depth - 1, false
        end
      end
    end
  end
  capture(#text)
end

-- Take in one more piece of a stream of events; return whether the stream has said that it is over.
local function events(s, text, found)
  local over = false
  if s.rest ~= "" then text = s.rest .. text end
  local start = 1
  while true do
    local place = string.find(text, "\\n", start, true)
    if place == nil then break end
    local line = string.gsub(string.sub(text, start, place - 1), "\\r$", "")
    start = place + 1
    if line == "" then
      over = over or ENDS[s.name] == true
      s.name, s.json = nil, fresh()
    else
      local field, value = string.match(line, "^(%a+): ?(.*)$")
      if field == "event" then
        s.name = value
      elseif field == "data" then
        if value == "[DONE]" then over = true else feed(s.json, value, found) end
      end
    end
  end
  s.rest = string.sub(text, start)
  if #s.rest > LONGEST_LINE then s.rest, found.bad = "", true end
  return over
end

local function tell(handle, known, found, whole)
  local texts = found.first or ""
  if found.last ~= nil then texts = texts .. "\\0" .. found.last end
  local headers = {
    [":method"] = "POST", [":path"] = "/", [":authority"] = "gatekeeper", ["x-saw-listener"] = "METER_SEAT",
    ["METER_HEADER"] = known.id, ["STATUS_HEADER"] = known.status, ["FLAGS_HEADER"] = known.flags,
    ["ENCODING_HEADER"] = known.encoding, ["WHOLE_HEADER"] = (whole and not found.bad) and "1" or "0",
  }
  for attempt = 0, math.max(3, #GATEKEEPERS) - 1 do
    local answer = handle:httpCall(GATEKEEPERS[attempt % #GATEKEEPERS + 1], headers, texts, 5000)
    if answer[":status"] == "200" then return end
  end
  handle:logWarn("a charge could not be told to the gatekeeper, so its reservation stands")
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local id = headers:get("METER_HEADER")
  headers:remove("METER_HEADER")
  if id == nil then return end
  headers:remove("accept-encoding")
  handle:streamInfo():dynamicMetadata():set("saw.meter", "id", id)
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local flags = headers:get("LOCAL_MARK")
  if DROP_MARK then headers:remove("LOCAL_MARK") end
  local meter = handle:streamInfo():dynamicMetadata():get("saw.meter")
  if meter == nil then return end
  local known = {id = meter["id"], status = headers:get(":status") or "", flags = flags or "",
    encoding = headers:get("content-encoding") or ""}
  local found, kind = {}, headers:get("content-type") or ""
  local streamed = string.find(string.lower(kind), "text/event-stream", 1, true) ~= nil
  local json, stream = fresh(), {rest = "", json = fresh()}
  for chunk in handle:bodyChunks() do
    local size = chunk:length()
    if size > 0 and known.encoding == "" then
      local text = chunk:getBytes(0, size)
      if not streamed then
        feed(json, text, found)
      elseif events(stream, text, found) then
        tell(handle, known, found, true)
        return
      end
    end
  end
  tell(handle, known, found, not streamed and json.opened and json.depth == 0)
end
"""


def usage_filter(*, drop_mark: bool, gatekeepers: Sequence[str] = ("gatekeeper",)) -> str:
    """Return the source of the filter; ``drop_mark``: Envoy's word that it answered itself is for the filter alone.

    ``gatekeepers`` are the clusters that are told the end of a call, one after the other until one of them has it: it is in the
    ledger once, however many of them were told.
    """
    source = _SOURCE
    for name, value in (
        ("STATUS_HEADER", STATUS_HEADER),
        ("FLAGS_HEADER", FLAGS_HEADER),
        ("ENCODING_HEADER", ENCODING_HEADER),
        ("WHOLE_HEADER", WHOLE_HEADER),
        ("METER_HEADER", METER_HEADER),
        ("METER_SEAT", METER_SEAT),
        ("LOCAL_MARK", LOCAL_MARK),
        ("LONGEST_USAGE", str(LONGEST_USAGE)),
        ("LONGEST_LINE", str(LONGEST_LINE)),
        ("NAMES", ", ".join(f'"{name}"' for name in gatekeepers)),
        ("DROP_MARK", "true" if drop_mark else "false"),
    ):
        source = source.replace(name, value)
    return source
