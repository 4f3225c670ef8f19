"""What a store of jobs does in Redis at once: Lua, which nothing interrupts.

What may become of a job is decided in ``job.py``, as for any other store: a process reads a job with its *stamp*,
decides, and has ``SAVE`` put the next one in its place if the stamp is still the same. A stamp is random, so that
asking again, when the answer was lost, is found to have been done. The scripts alone keep indexes and totals.

All keys begin with KEYS[1], which has a hash tag, so they are in one slot of a cluster:

    job:ID      hash: t stamp, r the job, s status, b bytes, n number of its arrival, o owner
    request:ID  response:ID
    order       sorted by number: all jobs that are kept; status:STATUS likewise
    ready       sorted by number: those that may run; later, by not_before: those that have to wait
    leases      by the end of the lease: those that run; owners: a hash, who runs how many; cancels: a hash, id to owner
    ends        by the time when they expire; callbacks: by the time when they are due
    buried      a hash, id to tombstone; graves: by the time when they expired
    totals      a hash: number (of the last job), bytes, change
"""

from __future__ import annotations

from typing import Final

# ARGV: id, stamp, job, bytes, request, jobs at most, bytes at most. 0: done; 1: too many jobs; 2: too many bytes.
SUBMIT: Final = """
local p, id = KEYS[1], ARGV[1]
local key, totals = p .. 'job:' .. id, p .. 'totals'
if redis.call('EXISTS', key) == 1 then return 0 end
if redis.call('ZCARD', p .. 'order') >= tonumber(ARGV[6]) then return 1 end
local used = tonumber(redis.call('HGET', totals, 'bytes') or '0')
if used + tonumber(ARGV[4]) > tonumber(ARGV[7]) then return 2 end
local number = redis.call('HINCRBY', totals, 'number', 1)
redis.call('HINCRBY', totals, 'bytes', ARGV[4])
redis.call('HINCRBY', totals, 'change', 1)
redis.call('HSET', key, 't', ARGV[2], 'r', ARGV[3], 's', 'queued', 'b', ARGV[4], 'n', number, 'o', '')
redis.call('SET', p .. 'request:' .. id, ARGV[5])
redis.call('ZADD', p .. 'order', number, id)
redis.call('ZADD', p .. 'status:queued', number, id)
redis.call('ZADD', p .. 'ready', number, id)
return 0
"""

# ARGV: bytes at most, or -1; then 13 for each job: id, its stamp, the next one, job, status, bytes, owner, not before,
# end of the lease, "1" if it is to be cancelled, when it expires or "", when its callback is due or "", response or "".
# For each: 1 done, 0 it has changed meanwhile or is not there, 2 too many bytes.
SAVE: Final = """
local p, limit, told, saved = KEYS[1], tonumber(ARGV[1]), {}, false
local totals = p .. 'totals'
local function save(id, stamp, next_stamp, job, status, bytes, owner, not_before, lease, cancel, ends, due, response)
  local key = p .. 'job:' .. id
  local old = redis.call('HMGET', key, 't', 's', 'b', 'n', 'o')
  if old[1] == next_stamp then return 1 end
  if not old[1] or old[1] ~= stamp then return 0 end
  local more = tonumber(bytes) - tonumber(old[3])
  if limit >= 0 and tonumber(redis.call('HGET', totals, 'bytes')) + more > limit then return 2 end
  redis.call('HINCRBY', totals, 'bytes', more)
  redis.call('HSET', key, 't', next_stamp, 'r', job, 's', status, 'b', bytes, 'o', owner)
  redis.call('ZREM', p .. 'status:' .. old[2], id)
  redis.call('ZADD', p .. 'status:' .. status, old[4], id)
  for _, index in ipairs({'ready', 'later', 'leases', 'ends', 'callbacks'}) do redis.call('ZREM', p .. index, id) end
  redis.call('HDEL', p .. 'cancels', id)
  if old[5] ~= '' and redis.call('HINCRBY', p .. 'owners', old[5], -1) <= 0 then
    redis.call('HDEL', p .. 'owners', old[5])
  end
  if status == 'queued' then
    if tonumber(not_before) > 0 then
      redis.call('ZADD', p .. 'later', not_before, id)
    else
      redis.call('ZADD', p .. 'ready', old[4], id)
    end
  elseif status == 'running' then
    redis.call('ZADD', p .. 'leases', lease, id)
    redis.call('HINCRBY', p .. 'owners', owner, 1)
    if cancel == '1' then redis.call('HSET', p .. 'cancels', id, owner) end
  else
    redis.call('DEL', p .. 'request:' .. id)
    if response ~= '' then redis.call('SET', p .. 'response:' .. id, response) end
  end
  if ends ~= '' then redis.call('ZADD', p .. 'ends', ends, id) end
  if due ~= '' then redis.call('ZADD', p .. 'callbacks', due, id) end
  saved = true
  return 1
end
for i = 2, #ARGV, 13 do
  told[#told + 1] = save(unpack(ARGV, i, i + 12))
end
if saved then redis.call('HINCRBY', totals, 'change', 1) end
return told
"""

# ARGV: tombstones at most, those before this time go, so many at most; then 4 for each: id, stamp, tombstone, when it
# expired. How many are tombstones now.
BURY: Final = """
local p, count = KEYS[1], 0
local graves, totals = p .. 'graves', p .. 'totals'
for i = 4, #ARGV, 4 do
  local id = ARGV[i]
  local key = p .. 'job:' .. id
  local old = redis.call('HMGET', key, 't', 's', 'b', 'n')
  if old[1] and old[1] == ARGV[i + 1] then
    redis.call('HINCRBY', totals, 'bytes', 0 - tonumber(old[3]))
    redis.call('DEL', key, p .. 'request:' .. id, p .. 'response:' .. id)
    for _, index in ipairs({'order', 'status:' .. old[2], 'ends', 'callbacks'}) do
      redis.call('ZREM', p .. index, id)
    end
    redis.call('HSET', p .. 'buried', id, ARGV[i + 2])
    redis.call('ZADD', graves, ARGV[i + 3], id)
    count = count + 1
  end
end
local function forget(ids)
  if #ids > 0 then
    redis.call('ZREM', graves, unpack(ids))
    redis.call('HDEL', p .. 'buried', unpack(ids))
  end
  return #ids
end
local gone = forget(redis.call('ZRANGEBYSCORE', graves, '-inf', ARGV[2], 'LIMIT', 0, ARGV[3]))
local many = redis.call('ZCARD', graves) - tonumber(ARGV[1])
if many > 0 then gone = gone + forget(redis.call('ZRANGE', graves, 0, math.min(many, tonumber(ARGV[3])) - 1)) end
if count + gone > 0 then redis.call('HINCRBY', totals, 'change', 1) end
return count
"""

# ARGV: ids of jobs that are in an index and not there, since Redis has evicted them. They go from all indexes.
FORGET: Final = """
local p = KEYS[1]
for _, id in ipairs(ARGV) do
  if redis.call('EXISTS', p .. 'job:' .. id) == 0 then
    redis.call('DEL', p .. 'request:' .. id, p .. 'response:' .. id)
    for _, index in ipairs({'order', 'ready', 'later', 'leases', 'ends', 'callbacks', 'status:queued',
        'status:running', 'status:succeeded', 'status:failed', 'status:cancelled'}) do
      redis.call('ZREM', p .. index, id)
    end
    redis.call('HDEL', p .. 'cancels', id)
  end
end
if redis.call('ZCARD', p .. 'order') == 0 then redis.call('HSET', p .. 'totals', 'bytes', 0) end
redis.call('HINCRBY', p .. 'totals', 'change', 1)
return 0
"""
