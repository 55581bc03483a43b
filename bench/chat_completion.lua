-- A chat request for wrk: wrk -s chat_completion.lua URL -- MODEL KEY; the last line is JSON.
local MICROSECONDS = 1e6

function init(arguments)
  local model, key = arguments[1], arguments[2]
  wrk.method = "POST"
  wrk.headers["content-type"] = "application/json"
  wrk.headers["authorization"] = "Bearer " .. key
  wrk.body = string.format(
    '{"model": "%s", "messages": [{"role": "system", "content": "Be brief."}, '
      .. '{"role": "user", "content": "What is six times seven?"}], "max_tokens": 32}',
    model
  )
end

function done(summary, latency, requests)
  local errors = summary.errors
  print(string.format(
    '{"rate": %.3f, "p50": %.4f, "p99": %.4f, "failed": %d}',
    summary.requests / (summary.duration / MICROSECONDS),
    latency:percentile(50) / 1000,
    latency:percentile(99) / 1000,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout
  ))
end
