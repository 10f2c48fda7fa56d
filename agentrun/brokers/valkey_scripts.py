"""What must be one step at the server, as Lua.

Keys, below a prefix ``{ar:<namespace>:<partition>}:`` (one slot of a cluster):

    t:<session>   hash: the session's end, its lease, and the agents of its queued inputs
    e:<session>   stream: all records but deltas; the id of a record is ``<offset>-0``
    d:<session>   stream: its deltas
    k:<session>:<key>   an input's dedupe key, with the incarnation, offset and writer it was stored by
    r:<agent>     sorted set: inputs that are ready and were never given out, by the time since when
    l:<agent>     sorted set: leased inputs, by the time their lease runs out
    a:<agent>     sorted set: inputs to be given out again, by the time from which on
    n:<agent>     how many inputs are queued, ready or not
    g:<token>     what a lease with this token was given, should the answer be lost
    s             set: the sessions that hold an input

Fields of ``t``: ``o t k p`` offset, time, kind and pending list of the last record ever stored; ``ko kt kk`` offset,
time and kind of the last one that is no delta; ``f`` the time of the first; ``x`` when the session was deleted last;
``dt dx`` the time of the oldest delta, and when the deltas' expiry was set; ``lo lt lx`` offset, token and end of the
lease; ``q<offset>`` the agent of a queued input. Times are microseconds since the epoch and grow within a session: they
are the records' cursors.

A record is a line of words (offset, kind, time, the offset of the last one before it that is no delta, writer, pending
list, agent) and its body. As it is stored, it is published and read.
"""

from __future__ import annotations

import hashlib


class Script:
    """A script and the name the server knows it by.

    Its first line has the server refuse keys of another slot, and the whole script where there is no memory, unless
    ``flags`` says that it needs none.
    """

    def __init__(self, name: str, text: str, flags: str = "") -> None:
        self.name = name
        self.text = f"#!lua flags={flags}\n{_COMMON}{text}" if flags else f"#!lua\n{_COMMON}{text}"
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def __repr__(self) -> str:
        return f"<script {self.name}>"


_COMMON = """
local call = redis.call

local function now()
  local t = call('TIME')
  return t[1] * 1000000 + t[2]
end

local function int(n) return string.format('%.0f', n) end

local function entries(text)
  local out = {}
  for offset, flag in string.gmatch(text, '(%d+)([apw]?)') do out[#out + 1] = {offset, flag} end
  return out
end

-- The offsets that may be leased: the head, and what wakes a parked head.
local function ready(list)
  local out = {}
  for i, entry in ipairs(list) do
    if i == 1 or (list[1][2] == 'p' and entry[2] == 'w') then out[#out + 1] = entry[1] end
  end
  return out
end

local function contains(list, value)
  for _, one in ipairs(list) do
    if one == value then return true end
  end
  return false
end

local function at(key, offset)
  local found = call('XRANGE', key, offset .. '-0', offset .. '-0')
  return found[1] and found[1][2][2]
end

local function words(record)
  return string.match(record, '^(%d+) (%a) (%d+) (%d+) (%S+) (%S+) (%S+)')
end

local function load(P, S)
  local s = {P = P, S = S, T = P .. 't:' .. S, E = P .. 'e:' .. S, D = P .. 'd:' .. S}
  local v = call('HMGET', s.T, 'o', 't', 'k', 'p', 'ko', 'kt', 'kk', 'f', 'x', 'dt', 'dx')
  s.exists = v[1] and true
  s.given, s.last, s.pending = v[1] or '0', v[2] or '0', v[4] or ''
  s.kept, s.first, s.deleted = v[5] or '0', v[8] or '0', v[9] or '0'
  s.oldest, s.expires = tonumber(v[10] or '0'), tonumber(v[11] or '0')
  if v[3] == 'd' and call('EXISTS', s.D) == 0 then
    s.offset, s.time, s.kind = s.kept, v[6] or '0', v[7] or ''
  else
    s.offset, s.time, s.kind = s.given, s.last, v[3] or ''
  end
  return s
end

local function tail(s) return {s.offset, s.given, s.time, s.kind, s.pending, s.kept} end

-- What became of a session that began at a time: '' it is there, 'gone' deleted, 'lost' the server lost it.
local function whereabouts(s, first)
  if s.exists and tonumber(s.first) <= tonumber(first) then return '' end
  return tonumber(s.deleted) >= tonumber(first) and 'gone' or 'lost'
end

-- The same of a record that was stored at this offset and time.
local function fate(s, offset, cursor)
  if cursor == '0' or offset == '0' then return '' end
  local what = whereabouts(s, cursor)
  if what ~= '' then return what end
  if tonumber(s.given) < tonumber(offset) then return 'lost' end
  local found = at(s.E, offset) or at(s.D, offset)
  if found then
    local _, _, time = words(found)
    if time ~= cursor then return 'lost' end
  end
  return ''
end

local function wake(N, P, agent) call('PUBLISH', N .. 'wake:' .. agent, P) end

local function unlist(P, agent, member)
  call('ZREM', P .. 'r:' .. agent, member)
  call('ZREM', P .. 'l:' .. agent, member)
  call('ZREM', P .. 'a:' .. agent, member)
end

local function listed(P, agent, member)
  return call('ZSCORE', P .. 'r:' .. agent, member) or call('ZSCORE', P .. 'l:' .. agent, member)
    or call('ZSCORE', P .. 'a:' .. agent, member)
end

-- While a cluster moves a slot key by key, it breaks a script off at the first key that is not there, also at one that
-- never was. So what a step may touch behind its first change it looks up before: what is broken off was not begun.
-- Here: the lists of an agent, and of those whose inputs these entries are.
local function foresee(s, agent, ...)
  local fields, seen = {}, {}
  for _, list in ipairs({...}) do
    for _, entry in ipairs(list) do fields[#fields + 1] = 'q' .. entry[1] end
  end
  local agents = #fields > 0 and call('HMGET', s.T, unpack(fields)) or {}
  agents[#agents + 1] = agent
  for _, name in ipairs(agents) do
    if name and not seen[name] then
      seen[name] = true
      call('EXISTS', s.P .. 'n:' .. name, s.P .. 'r:' .. name, s.P .. 'l:' .. name, s.P .. 'a:' .. name)
    end
  end
end

-- Takes an input off the queue for ever; returns its agent, if it was queued.
local function unqueue(s, offset)
  local agent = call('HGET', s.T, 'q' .. offset)
  if agent then
    call('HDEL', s.T, 'q' .. offset)
    call('DECR', s.P .. 'n:' .. agent)
    unlist(s.P, agent, offset .. ':' .. s.S)
  end
  return agent
end

local function let_go(s) call('HDEL', s.T, 'lo', 'lt', 'lx') end

-- After the pending list or the lease has changed: drops what was settled, lists what has become ready. While an input
-- of the session is leased, no other one is listed.
local function requeue(s, N, before, after, t)
  local list, left = entries(after), {}
  for _, entry in ipairs(list) do left[entry[1]] = true end
  if before ~= after then
    for _, entry in ipairs(entries(before)) do
      if not left[entry[1]] then unqueue(s, entry[1]) end
    end
  end
  local lease = call('HMGET', s.T, 'lo', 'lx')
  if lease[1] and not left[lease[1]] then
    let_go(s)
  elseif lease[1] and tonumber(lease[2]) > t then
    return
  end
  for _, offset in ipairs(ready(list)) do
    local agent = call('HGET', s.T, 'q' .. offset)
    local member = offset .. ':' .. s.S
    if agent and not listed(s.P, agent, member) then
      call('ZADD', s.P .. 'r:' .. agent, int(t), member)
      wake(N, s.P, agent)
    end
  end
end
"""

TAIL = Script(
    "tail",
    """
return tail(load(ARGV[1], ARGV[2]))
""",
    "no-writes",
)

# prefix, session, prefix of channels, after: offset, last given, cursor; kind, pending, agent or '-', dedupe key or '',
# dedupe window in ms, deltas' time to live in ms, writer, body.
APPEND = Script(
    "append",
    """
local P, S, N, offset, given, cursor = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local kind, pending, agent, dedupe, window = ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11]
local ttl, writer, body = tonumber(ARGV[12]), ARGV[13], ARGV[14]
local s = load(P, S)

if dedupe ~= '' then
  local key = call('GET', P .. 'k:' .. S .. ':' .. dedupe)
  if key then
    local first, where, by = string.match(key, '^(%d+) (%d+) (%S+)$')
    if first == s.first then
      if by ~= writer then return {'duplicate', where} end
      local own = at(s.E, where)
      if own then return {'stored', string.match(own, '^[^\\n]*')} end
    end
  end
end

if tonumber(given) < tonumber(s.given) or offset ~= s.offset or (cursor ~= '0' and cursor ~= s.time) then
  local place = int(tonumber(given) + 1)
  local own = at(s.E, place) or at(s.D, place)
  if own then
    local _, _, _, _, by = words(own)
    if by == writer then return {'stored', string.match(own, '^[^\\n]*')} end
  end
  local what = fate(s, offset, cursor)
  if what == 'lost' then return {'lost', s.given} end
  return {'conflict', unpack(tail(s))}
end

if kind == 't' then call('EXISTS', P .. 's') end
if kind == 't' or pending ~= s.pending then
  foresee(s, kind == 't' and agent, entries(s.pending), entries(pending))
end
local t = now()
t = math.max(t, tonumber(s.last) + 1, tonumber(s.deleted) + 1)
local o, time = int(tonumber(given) + 1), int(t)
local header = table.concat(
  {o, kind, time, s.kept, writer, pending == '' and '-' or pending, agent}, ' ')
local record = header .. '\\n' .. body

if kind == 'd' then
  local old = t - ttl * 1000
  if s.oldest > 0 and s.oldest < old then
    -- Oldest first, in pages: as much as has expired since the last time.
    s.oldest = t
    local through = nil
    while true do
      local some = call('XRANGE', s.D, through and '(' .. through or '-', '+', 'COUNT', 100)
      local young = nil
      for _, entry in ipairs(some) do
        local _, _, stored = words(entry[2][2])
        if tonumber(stored) > old then young = stored break end
        through = entry[1]
      end
      if young then s.oldest = tonumber(young) break end
      if #some < 100 then break end
    end
    if through then
      local last = string.match(through, '^%d+')
      call('XTRIM', s.D, 'MINID', int(tonumber(last) + 1) .. '-0')
    end
    call('HSET', s.T, 'dt', int(s.oldest))
  end
  local fresh = call('EXISTS', s.D) == 0
  call('XADD', s.D, o .. '-0', 'r', record)
  if fresh or t - s.expires > ttl * 125 then
    -- Set anew now and then only: an eighth more than need be.
    call('PEXPIRE', s.D, int(ttl * 1.125))
    call('HSET', s.T, 'dx', time)
    if fresh then call('HSET', s.T, 'dt', time) end
  end
  call('HSET', s.T, 'o', o, 't', time, 'k', kind, 'p', pending)
else
  call('XADD', s.E, o .. '-0', 'r', record)
  call('HSET', s.T, 'o', o, 't', time, 'k', kind, 'p', pending, 'ko', o, 'kt', time, 'kk', kind)
end
if not s.exists then
  call('HSET', s.T, 'f', time)
  call('PERSIST', s.T)
  s.first = time
end
if dedupe ~= '' then
  call('SET', P .. 'k:' .. S .. ':' .. dedupe, s.first .. ' ' .. o .. ' ' .. writer, 'PX', window)
end
if kind == 't' then
  call('SADD', P .. 's', S)
  for _, entry in ipairs(entries(pending)) do
    if entry[1] == o then
      call('HSET', s.T, 'q' .. o, agent)
      call('INCR', P .. 'n:' .. agent)
    end
  end
end
if pending ~= s.pending then requeue(s, N, s.pending, pending, t) end
call('PUBLISH', N .. (kind == 'd' and 'deltas:' or 'events:') .. S, record)
return {'stored', header}
""",
)

# prefix, session, after, cursor or 0, whether deltas are wanted, how many records, how many bytes, when the session
# began or 0.
READ = Script(
    "read",
    """
local after, cursor, deltas = ARGV[3], ARGV[4], ARGV[5]
local limit, budget = tonumber(ARGV[6]), tonumber(ARGV[7])
local s = load(ARGV[1], ARGV[2])
local what = ARGV[8] ~= '0' and whereabouts(s, ARGV[8]) or ''
if what == '' then what = fate(s, after, cursor) end
if what ~= '' then return {what, s.given, s.first} end

local function page(key)
  local out, size, from = {}, 0, tonumber(after)
  while #out < limit and size < budget do
    local want = math.min(50, limit - #out)
    local some = call('XRANGE', key, int(from + 1) .. '-0', '+', 'COUNT', want)
    for _, entry in ipairs(some) do
      out[#out + 1] = entry[2][2]
      size = size + #entry[2][2]
    end
    if #some < want then return out, 1 end
    from = tonumber(string.match(some[#some][1], '^%d+'))
  end
  return out, 0
end

local e, e_all, d, d_all = {}, 1, {}, 1
if tonumber(after) < tonumber(s.kept) then e, e_all = page(s.E) end
if deltas == '1' and tonumber(after) < tonumber(s.given) then d, d_all = page(s.D) end
return {'', s.given, s.first, e, e_all, d, d_all}
""",
    "no-writes",
)

# prefix, session, prefix of channels, the time to keep what says that the session was deleted, in ms.
DELETE = Script(
    "delete",
    """
local P, S, N = ARGV[1], ARGV[2], ARGV[3]
local s = load(P, S)
if not s.exists then return 0 end
call('EXISTS', s.E, s.D, P .. 's')
foresee(s, false, entries(s.pending))
for _, entry in ipairs(entries(s.pending)) do unqueue(s, entry[1]) end
local t = int(math.max(now(), tonumber(s.last) + 1))
call('DEL', s.T, s.E, s.D)
call('SREM', P .. 's', S)
call('HSET', s.T, 'x', t)
call('PEXPIRE', s.T, ARGV[4])
call('PUBLISH', N .. 'events:' .. S, '')
return 1
""",
    "allow-oom",
)

# prefix, prefix of channels, agent, token (the holder's connection, a dot, something new), lease time in microseconds,
# whether this asks again.
LEASE = Script(
    "lease",
    """
local P, N, agent, token, ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local t = now()
local GRACE = 200000

call('EXISTS', P .. 'g:' .. token, P .. 'r:' .. agent, P .. 'l:' .. agent, P .. 'a:' .. agent)

local function same_holder(one, other) return string.match(one, '^%x+') == string.match(other, '^%x+') end

local function give(s, offset)
  local record = at(s.E, offset)
  return record and {'lease', s.S, record, unpack(tail(s))}
end

if ARGV[6] == '1' then
  local member = call('GET', P .. 'g:' .. token)
  if member then
    local offset, S = string.match(member, '^(%d+):(.*)$')
    local s = load(P, S)
    local lease = call('HMGET', s.T, 'lo', 'lt')
    local given = lease[1] == offset and lease[2] == token and give(s, offset)
    if given then return given end
  end
end

-- What was given out before goes first: those turns have begun. Who let a lease run out does not get it again at once.
local soonest = nil
for _, list in ipairs({'l:', 'a:', 'r:'}) do
  local key, passed = P .. list .. agent, 0
  for _ = 1, 100 do
    local member = call('ZRANGEBYSCORE', key, '-inf', int(t), 'LIMIT', passed, 1)[1]
    if not member then break end
    local offset, S = string.match(member, '^(%d+):(.*)$')
    local s = load(P, S)
    local lease = call('HMGET', s.T, 'lo', 'lx', 'lt', 'q' .. offset)
    local ours = lease[1] == offset
    local again = ours and same_holder(lease[3], token) and tonumber(lease[2]) + GRACE
    if again and again > t then
      passed = passed + 1
      soonest = math.min(again, soonest or again)
    else
      foresee(s, false, entries(s.pending), {{offset}})
      call('ZREM', key, member)
      if ours then let_go(s) end
      local busy = not ours and lease[1] and tonumber(lease[2]) > t
      if lease[4] == agent and not busy then
        local given = contains(ready(entries(s.pending)), offset) and give(s, offset)
        if given then
          call('HSET', s.T, 'lo', offset, 'lt', token, 'lx', int(t + ttl))
          call('ZADD', P .. 'l:' .. agent, int(t + ttl), member)
          call('SET', P .. 'g:' .. token, member, 'PX', 60000)
          return given
        end
        -- It was trimmed, or it waits again for those before it.
        if not at(s.E, offset) then unqueue(s, offset) end
        requeue(s, N, s.pending, s.pending, t)
      end
    end
  end
  local first = call('ZRANGE', key, passed, passed, 'WITHSCORES')
  if first[2] then soonest = math.min(tonumber(first[2]), soonest or tonumber(first[2])) end
end
return {'none', soonest and int(soonest) or ''}
""",
)

# prefix, session, offset, token, agent, lease time in microseconds.
EXTEND = Script(
    "extend",
    """
local P, S, offset, token, agent = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local T = P .. 't:' .. S
local lease = call('HMGET', T, 'lo', 'lt')
if lease[1] ~= offset or lease[2] ~= token then return 0 end
call('EXISTS', P .. 'l:' .. agent)
local till = int(now() + tonumber(ARGV[6]))
call('HSET', T, 'lx', till)
call('ZADD', P .. 'l:' .. agent, 'XX', till, offset .. ':' .. S)
return 1
""",
    "allow-oom",
)

# prefix, session, prefix of channels, offset, token.
ACK = Script(
    "ack",
    """
local s = load(ARGV[1], ARGV[2])
local lease = call('HMGET', s.T, 'lo', 'lt')
if lease[1] ~= ARGV[4] or lease[2] ~= ARGV[5] then return 0 end
foresee(s, false, entries(s.pending), {{ARGV[4]}})
let_go(s)
unqueue(s, ARGV[4])
requeue(s, ARGV[3], s.pending, s.pending, now())
return 1
""",
    "allow-oom",
)

# prefix, session, prefix of channels, offset, token or '' for whoever holds it, delay in microseconds.
GIVE_BACK = Script(
    "give_back",
    """
local P, S, N, offset, token = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local s, t = load(P, S), now()
local v = call('HMGET', s.T, 'lo', 'lt', 'q' .. offset)
if v[1] ~= offset or (token ~= '' and v[2] ~= token) then return 0 end
foresee(s, false, entries(s.pending), {{offset}})
let_go(s)
local agent = v[3]
if agent then
  call('ZREM', P .. 'l:' .. agent, offset .. ':' .. S)
  call('ZADD', P .. 'a:' .. agent, int(t + tonumber(ARGV[6])), offset .. ':' .. S)
  wake(N, P, agent)
end
requeue(s, N, s.pending, s.pending, t)
return 1
""",
    "allow-oom",
)

# prefix, agent. Gives how many inputs are queued, and how many of them are leased.
STATS = Script(
    "stats",
    """
local queued = tonumber(call('GET', ARGV[1] .. 'n:' .. ARGV[2]) or '0')
return {queued, call('ZCOUNT', ARGV[1] .. 'l:' .. ARGV[2], '(' .. int(now()), '+inf')}
""",
    "no-writes",
)
