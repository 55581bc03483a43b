-- Put what a request used in place of its estimate, end its lease, add up.
-- KEYS: held, leases, spent, usage
-- ARGV: lease, tokens, nanodollars, seconds that `spent` and `usage` are kept, name, count, ...
local held, leases, spent, usage = unpack(KEYS)
local lease, tokens, cost = ARGV[1], ARGV[2], tonumber(ARGV[3])

redis.call('ZREM', leases, lease)
local estimate = redis.call('HGET', held, lease)
if estimate then
  redis.call('HSET', held, lease, tokens)
  redis.call('HINCRBY', held, 'sum', string.format('%.0f', tokens - estimate))
end
if cost > 0 then
  redis.call('INCRBY', spent, ARGV[3])
  redis.call('EXPIRE', spent, ARGV[4])
end
for index = 6, #ARGV, 2 do
  redis.call('HINCRBY', usage, ARGV[index], ARGV[index + 1])
end
redis.call('EXPIRE', usage, ARGV[5])
