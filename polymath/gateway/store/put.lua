-- Keep a value for a time; the oldest go when a shelf has too many.
-- KEYS: value, shelf; ARGV: value, milliseconds, most
local value, shelf = unpack(KEYS)
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

redis.call('SET', value, ARGV[1], 'PX', ARGV[2])
redis.call('ZADD', shelf, string.format('%.0f', now), value)
local excess = redis.call('ZCARD', shelf) - ARGV[3]
if excess > 0 then
  for _, name in ipairs(redis.call('ZRANGE', shelf, 0, excess - 1)) do
    redis.call('DEL', name)
  end
  redis.call('ZREMRANGEBYRANK', shelf, 0, excess - 1)
end
local left = redis.call('PTTL', shelf)
if left < tonumber(ARGV[2]) then
  redis.call('PEXPIRE', shelf, ARGV[2])
end
