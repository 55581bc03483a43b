-- Let a request in if its key is what it was and its limits allow it; all or nothing.
-- KEYS: records, window, held, leases, spent
-- ARGV: key, record, window and lease in microseconds, lease, tokens,
--       limits of requests, tokens, concurrent requests and nanodollars (-1 is none)
local PAGE = 64 -- entries read at a time, as the first few are mostly enough
local records, window, held, leases, spent = unpack(KEYS)
local key, record, span, lease_span, lease, tokens = unpack(ARGV)
span, lease_span, tokens = tonumber(span), tonumber(lease_span), tonumber(tokens)
local most_requests, most_tokens = tonumber(ARGV[7]), tonumber(ARGV[8])
local most_running, budget = tonumber(ARGV[9]), tonumber(ARGV[10])

local current = redis.call('HGET', records, key)
if current ~= record then
  return { current or '' }
end

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function micros(number)
  return string.format('%.0f', number)
end

local gone = redis.call('ZRANGEBYSCORE', window, '-inf', micros(now - span))
if #gone > 0 then
  local freed = 0
  for _, name in ipairs(gone) do
    freed = freed + (redis.call('HGET', held, name) or 0)
    redis.call('HDEL', held, name)
    redis.call('ZREM', window, name)
  end
  redis.call('HINCRBY', held, 'sum', micros(0 - freed)) -- minus zero is no integer to Redis
end
redis.call('ZREMRANGEBYSCORE', leases, '-inf', micros(now))

local requests = redis.call('ZCARD', window)
local used = tonumber(redis.call('HGET', held, 'sum') or 0)

-- Until enough of the oldest requests have left the window for both limits; 0 if that is never.
local function wait_for_room()
  if most_requests == 0 or (most_tokens >= 0 and tokens > most_tokens) then
    return 0
  end
  local fewer = most_requests >= 0 and requests - most_requests + 1 or 0
  local excess = most_tokens >= 0 and used + tokens - most_tokens or 0
  for first = 0, requests - 1, PAGE do
    local entries = redis.call('ZRANGE', window, first, first + PAGE - 1, 'WITHSCORES')
    for index = 1, #entries, 2 do
      fewer = fewer - 1
      excess = excess - (redis.call('HGET', held, entries[index]) or 0)
      if fewer <= 0 and excess <= 0 then
        return entries[index + 1] + span - now
      end
    end
  end
  return 0
end

local refused, wait = 0, 0
if budget >= 0 and tonumber(redis.call('GET', spent) or 0) >= budget then
  refused = 4
elseif most_requests >= 0 and requests >= most_requests then
  refused, wait = 1, wait_for_room()
elseif most_tokens >= 0 and used + tokens > most_tokens then
  refused, wait = 2, wait_for_room()
elseif most_running >= 0 and redis.call('ZCARD', leases) >= most_running then
  refused = 3
end

if refused == 0 then
  redis.call('ZADD', window, micros(now), lease)
  redis.call('HSET', held, lease, tokens)
  redis.call('HINCRBY', held, 'sum', tokens)
  redis.call('ZADD', leases, micros(now + lease_span), lease)
  redis.call('PEXPIRE', window, math.ceil(span / 1000) + 1000)
  redis.call('PEXPIRE', held, math.ceil(span / 1000) + 1000)
  redis.call('PEXPIRE', leases, math.ceil(lease_span / 1000) + 1000)
  requests, used = requests + 1, used + tokens
end

local newest = redis.call('ZRANGE', window, -1, -1, 'WITHSCORES')[2]
local reset = newest and math.max(0, newest + span - now) or 0
return { refused, requests, used, micros(reset), micros(wait) }
