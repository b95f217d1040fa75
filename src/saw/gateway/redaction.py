"""Keeps a credential that a service sends back (a debug page, an error, an echo) from reaching the workspace.

The gatekeeper tells Envoy, beside the header to inject, how the value could come back; a filter of Envoy writes stars over every
occurrence in headers, body and trailers of the answer, as it streams by. Lengths do not change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from urllib.parse import quote

from saw.policy.grpc_calls import CONTENT_TYPE

WORDS_HEADER = "x-saw-redact"
"""The header in which the gatekeeper names the words. The filter takes it out before the request goes on."""
SHORTEST = 8
"""Fewest characters of a value that is looked for; shorter ones would be found by chance."""
_BETWEEN = "\t"


def reflections(secret: str, encoded: Iterable[str]) -> tuple[str, ...]:
    """Return how ``secret`` could come back, the longest form first: as it is, in JSON, percent-encoded, as ``encoded`` says.

    ``encoded`` are the Base64 forms in which the value is sent. All are printable ASCII.
    """
    forms = {secret, json.dumps(secret)[1:-1], secret.replace("/", "\\/"), quote(secret, safe=""), *encoded}
    return longest_first(form for form in forms if len(form) >= SHORTEST)


def longest_first(forms: Iterable[str]) -> tuple[str, ...]:
    """Return each of ``forms`` once, so that one within another is looked for after it."""
    return tuple(sorted(set(forms), key=lambda form: (-len(form), form)))


def words_value(words: Iterable[str]) -> str:
    """Return the value of :data:`WORDS_HEADER`."""
    return _BETWEEN.join(words)


# A piece of an answer may end in the middle of a word: as much of it as could begin one is held back until the next piece, but
# on a WebSocket and in a gRPC call, where a word is found only within one piece. The answer must be readable, so the service is
# not told that it may compress it.
REDACTION_FILTER = f"""
local function split(text)
  local words = {{}}
  for word in string.gmatch(text, "[^\\t]+") do words[#words + 1] = word end
  return words
end

local function starred(text, words)
  for _, word in ipairs(words) do
    local at = string.find(text, word, 1, true)
    if at ~= nil then
      local stars, parts, start = string.rep("*", #word), {{}}, 1
      while at ~= nil do
        parts[#parts + 1] = string.sub(text, start, at - 1)
        parts[#parts + 1] = stars
        start = at + #word
        at = string.find(text, word, start, true)
      end
      parts[#parts + 1] = string.sub(text, start)
      text = table.concat(parts)
    end
  end
  return text
end

local function beginning(text, words)
  local longest = 0
  for _, word in ipairs(words) do
    for size = math.min(#word - 1, #text), longest + 1, -1 do
      if string.sub(text, -size) == string.sub(word, 1, size) then
        longest = size
        break
      end
    end
  end
  return longest
end

local function star_all(headers, words)
  local changed = {{}}
  for name, value in pairs(headers) do
    if starred(value, words) ~= value then changed[name] = true end
  end
  for name in pairs(changed) do
    local values = {{}}
    for place = 0, headers:getNumValues(name) - 1 do
      values[#values + 1] = starred(headers:getAtIndex(name, place), words)
    end
    headers:remove(name)
    for _, value in ipairs(values) do headers:add(name, value) end
  end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local words = headers:get("{WORDS_HEADER}")
  headers:remove("{WORDS_HEADER}")
  if words == nil then return end
  headers:remove("accept-encoding")
  headers:remove("grpc-accept-encoding")
  handle:streamInfo():dynamicMetadata():set("saw.redaction", "words", words)
end

function envoy_on_response(handle)
  local known = handle:streamInfo():dynamicMetadata():get("saw.redaction")
  if known == nil then return end
  local words = split(known["words"])
  local headers = handle:headers()
  star_all(headers, words)
  local kind = string.lower(headers:get("content-type") or "")
  local stream = headers:get(":status") == "101" or string.sub(kind, 1, {len(CONTENT_TYPE)}) == "{CONTENT_TYPE}"
  local held, sent, last = "", "", nil
  for chunk in handle:bodyChunks() do
    local size = chunk:length()
    local text = held
    if size > 0 then text = starred(held .. chunk:getBytes(0, size), words) end
    -- What is held back could be the end of a message that the other side waits for.
    local kept = stream and 0 or beginning(text, words)
    held = string.sub(text, #text - kept + 1)
    sent = string.sub(text, 1, #text - kept)
    if sent ~= "" or size > 0 then chunk:setBytes(sent) end
    last = chunk
  end
  -- Before the rest of the body: where trailers follow, the last piece is gone, and an error there ends the filter.
  local trailers = handle:trailers()
  if trailers ~= nil then star_all(trailers, words) end
  if held ~= "" then last:setBytes(sent .. held) end
end
"""
