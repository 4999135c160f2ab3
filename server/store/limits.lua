-- The limits of a tenant, and of an end user under it. `server/policy/limits.py` holds the same rule in Python.
--
-- Every key of a call carries the tenant in {braces}, so that a cluster keeps them in one place.
-- A bucket is a hash: for each rate the moment at which it has drained, in microseconds, and a rest in limit-ths of
-- one; and `n`, when it was written. Leases are a sorted set by the moment at which they end. Both expire when they would
-- say nothing any more.
-- The clock of a machine may be set back, and another machine may take over whose clock is behind. What was written
-- later than now is moved by as much, and a lease that ends too late is taken out: its holder will renew it.

local PERIOD_MS = {60000, 60000, 86400000}
local UNIT = {'requests', 'tokens', 'tokens'}
local LEASE_US = 60000000
local TOLD_MS = 600000
local CONCURRENCY_WAIT_US = 1000000

local function now_us()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

local function text(number)
  return string.format('%.0f', number)
end

-- How long `amount` units take to drain: microseconds and a rest. fmod is exact, and each product is below 2^53.
local function span(amount, rate, limit)
  local units = amount * PERIOD_MS[rate]
  local rest_ms = math.fmod(units, limit)
  local rest = math.fmod(rest_ms * 1000, limit)
  return (units - rest_ms) / limit * 1000 + (rest_ms * 1000 - rest) / limit, rest
end

local function shifted(moment, rate, limit, amount, now)
  if amount == 0 or (amount < 0 and moment.us == 0) then return moment end
  local us, rest = moment.us, moment.rest
  if amount > 0 and us < now then us, rest = now, 0 end
  if rest >= limit then rest = 0 end
  local more_us, more_rest = span(math.abs(amount), rate, limit)
  if amount > 0 then
    us, rest = us + more_us, rest + more_rest
    if rest >= limit then us, rest = us + 1, rest - limit end
  else
    us, rest = us - more_us, rest - more_rest
    if rest < 0 then us, rest = us - 1, rest + limit end
  end
  return {us = us, rest = rest}
end

local function read(key, now)
  local stored = redis.call('HMGET', key, 'r', 'rr', 't', 'tr', 'd', 'dr', 'n')
  local back = math.max(0, tonumber(stored[7] or '0') - now)
  local moments = {}
  for rate = 1, 3 do
    local us = tonumber(stored[2 * rate - 1] or '0')
    moments[rate] = {us = us > 0 and us - back or us, rest = tonumber(stored[2 * rate] or '0')}
  end
  return moments
end

local function write(key, moments, now)
  local last = 0
  for rate = 1, 3 do last = math.max(last, moments[rate].us) end
  if last <= now then
    redis.call('DEL', key)
    return
  end
  redis.call('HSET', key,
    'r', text(moments[1].us), 'rr', text(moments[1].rest),
    't', text(moments[2].us), 'tr', text(moments[2].rest),
    'd', text(moments[3].us), 'dr', text(moments[3].rest), 'n', text(now))
  redis.call('PEXPIREAT', key, text(math.floor(last / 1000) + 1))
end

-- Take out of a sorted set by end what has ended, and what would last longer than anything does.
local function trim(key, now, longest)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', text(now))
  redis.call('ZREMRANGEBYSCORE', key, '(' .. text(now + longest), '+inf')
end

-- The limits of scope number `scope`, 0 where there is none; four for each scope, behind the arguments `before`.
local function limits_of(args, before, scope)
  local limits = {}
  for i = 1, 4 do limits[i] = tonumber(args[before + 4 * (scope - 1) + i]) end
  return limits
end

-- charge LEASE REQUESTS TOKENS LIMITS...   KEYS: bucket and leases of each scope
-- Answers with numbers in one string, which a client reads ten times faster than a list of them:
-- granted scope limit wait_us now_us, then the moments of each scope as us and rest
local function charge(keys, args)
  local now = now_us()
  local lease, cost = args[2], {requests = tonumber(args[3]), tokens = tonumber(args[4])}
  local answer = {1, 0, 0, 0, now}
  local before, after = {}, {}
  local function refuse(scope, limit, wait)
    if answer[1] == 1 or wait > answer[4] then
      answer[1], answer[2], answer[3], answer[4] = 0, scope, limit, wait
    end
  end
  for scope = 1, #keys / 2 do
    local limits, moments, shift = limits_of(args, 4, scope), read(keys[2 * scope - 1], now), {}
    for rate = 1, 3 do
      shift[rate] = moments[rate]
      local amount = cost[UNIT[rate]]
      if limits[rate] > 0 and amount > 0 then
        shift[rate] = shifted(moments[rate], rate, limits[rate], amount, now)
        local wait = shift[rate].us - PERIOD_MS[rate] * 1000 - now
        if shift[rate].rest > 0 then wait = wait + 1 end
        if wait > 0 then refuse(scope, rate, wait) end
      end
    end
    if limits[4] > 0 and lease ~= '' then
      trim(keys[2 * scope], now, LEASE_US)
      if redis.call('ZCARD', keys[2 * scope]) >= limits[4] then refuse(scope, 4, CONCURRENCY_WAIT_US) end
    end
    before[scope], after[scope] = moments, shift
  end
  for scope = 1, #keys / 2 do
    if answer[1] == 1 then
      write(keys[2 * scope - 1], after[scope], now)
      if limits_of(args, 4, scope)[4] > 0 and lease ~= '' then
        redis.call('ZADD', keys[2 * scope], text(now + LEASE_US), lease)
        redis.call('PEXPIRE', keys[2 * scope], text(LEASE_US / 1000))
      end
    end
    local shown = answer[1] == 1 and after[scope] or before[scope]
    for rate = 1, 3 do
      answer[#answer + 1] = shown[rate].us
      answer[#answer + 1] = shown[rate].rest
    end
  end
  for i = 1, #answer do answer[i] = text(answer[i]) end
  return table.concat(answer, ' ')
end

-- settle LEASE REQUESTS TOKENS SCOPES LIMITS... [MODEL DAY_S MONTH_S REQUESTS PROMPT CACHED COMPLETION]
-- KEYS: bucket and leases of each scope, then the usage of the day and of the month, then this settle's own name: who
-- has no answer says it again, and may have been heard the first time
local function settle(keys, args)
  if not redis.call('SET', keys[#keys], 1, 'NX', 'PX', TOLD_MS) then return 0 end
  local now = now_us()
  local lease, change = args[2], {requests = tonumber(args[3]), tokens = tonumber(args[4])}
  local scopes = tonumber(args[5])
  for scope = 1, scopes do
    local limits, moments = limits_of(args, 5, scope), read(keys[2 * scope - 1], now)
    for rate = 1, 3 do
      if limits[rate] > 0 then
        moments[rate] = shifted(moments[rate], rate, limits[rate], change[UNIT[rate]], now)
      end
    end
    write(keys[2 * scope - 1], moments, now)
    if lease ~= '' then redis.call('ZREM', keys[2 * scope], lease) end
  end
  local usage = 5 + 4 * scopes
  if #args == usage then return 1 end
  local fields = {'requests', 'prompt_tokens', 'cached_tokens', 'completion_tokens'}
  for i = 1, 2 do
    local key = keys[2 * scopes + i]
    for j = 1, 4 do
      local amount = args[usage + 3 + j]
      if amount ~= '0' then redis.call('HINCRBY', key, args[usage + 1] .. '|' .. fields[j], amount) end
    end
    redis.call('EXPIRE', key, args[usage + 1 + i])
  end
  return 1
end

-- renew LEASE...   KEYS: the leases of one scope
local function renew(keys, args)
  local ends = text(now_us() + LEASE_US)
  for i = 2, #args do redis.call('ZADD', keys[1], ends, args[i]) end
  redis.call('PEXPIRE', keys[1], text(LEASE_US / 1000))
  return 1
end

-- alive REPLICA TTL_US   KEYS: the replicas. Answers how many are alive.
local function alive(keys, args)
  local now, ttl = now_us(), tonumber(args[3])
  trim(keys[1], now, ttl)
  redis.call('ZADD', keys[1], text(now + ttl), args[2])
  redis.call('PEXPIRE', keys[1], text(ttl / 1000))
  return redis.call('ZCARD', keys[1])
end

local operations = {charge = charge, settle = settle, renew = renew, alive = alive}

-- Several operations in one call, one after the other. For each: how many keys and how many words it has, then its words.
local answers, last_key, word = {}, 0, 1
while word < #ARGV do
  local keys, args = {}, {}
  for i = 1, tonumber(ARGV[word]) do keys[i] = KEYS[last_key + i] end
  for i = 1, tonumber(ARGV[word + 1]) do args[i] = ARGV[word + 1 + i] end
  last_key, word = last_key + #keys, word + 2 + #args
  answers[#answers + 1] = operations[args[1]](keys, args)
end
return answers
