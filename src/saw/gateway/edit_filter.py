"""Writes into the body of an allowed call the model that the one it names stands for, on its way out.

The gatekeeper has read the whole body and names the bytes to replace; the filter of Envoy does just that, and sends nothing
where the body is not as long as the one that was read.
"""

from __future__ import annotations

from saw.gateway.envoy_parts import EDIT_HEADER
from saw.policy.inference import Edit

_SOURCE = """
function envoy_on_request(handle)
  local headers = handle:headers()
  local edit = headers:get("EDIT_HEADER")
  headers:remove("EDIT_HEADER")
  if edit == nil then return end
  local from, upto, size, text = string.match(edit, '^(%d+),(%d+),(%d+),(".+")$')
  local body = handle:body()
  if from == nil or body == nil or body:length() ~= tonumber(size) then
    handle:respond({[":status"] = "403", ["content-type"] = "application/json"},
      '{"error": "policy_denied", "layer": "ring2", "reason": "gatekeeper_unavailable", "detail": "another call was read"}')
    return
  end
  local whole = body:getBytes(0, body:length())
  local length = body:setBytes(string.sub(whole, 1, tonumber(from)) .. text .. string.sub(whole, tonumber(upto) + 1))
  if headers:get("content-length") ~= nil then headers:replace("content-length", tostring(length)) end
end
"""
EDIT_FILTER = _SOURCE.replace("EDIT_HEADER", EDIT_HEADER)
"""The source of the filter."""


def edit_value(edit: Edit) -> str:
    """Return what the filter is told about ``edit``; its text is a JSON string of plain characters."""
    return f"{edit.start},{edit.end},{edit.size},{edit.text}"
