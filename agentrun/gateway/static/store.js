// What this browser remembers. Storage may be forbidden or full: then it is forgotten with the tab.

const PREFIX = 'agentrun.'
const MOST = 60

function read(storage, key, fallback) {
  try {
    return JSON.parse(storage().getItem(PREFIX + key)) ?? fallback
  } catch {
    return fallback
  }
}

function write(storage, key, value) {
  try {
    if (value === null) storage().removeItem(PREFIX + key)
    else storage().setItem(PREFIX + key, JSON.stringify(value))
  } catch {
    // as said above
  }
}

const local = () => localStorage
const tab = () => sessionStorage

export const store = {
  get: (key, fallback = null) => read(local, key, fallback),
  set: (key, value) => write(local, key, value),

  /** The token, for this tab only. */
  get token() {
    return read(tab, 'token', '')
  },
  set token(value) {
    write(tab, 'token', value || null)
  },

  /** Messages on their way, so that a reload does not lose them. */
  get outbox() {
    return read(tab, 'outbox', [])
  },
  set outbox(entries) {
    write(tab, 'outbox', entries.length > 0 ? entries : null)
  },

  /** Sessions seen here, newest first: `{id, title, time}`. */
  sessions() {
    const sessions = read(local, 'sessions', [])
    return Array.isArray(sessions) ? sessions.filter((entry) => typeof entry?.id === 'string') : []
  },

  remember(id, title, time) {
    const others = this.sessions().filter((entry) => entry.id !== id)
    write(local, 'sessions', [{ id, title, time }, ...others].sort((a, b) => b.time - a.time).slice(0, MOST))
  },
}

/** What a device is called until its owner names it. */
export function defaultDevice() {
  const agent = navigator.userAgent
  const browser = [
    ['Edg/', 'Edge'],
    ['Firefox/', 'Firefox'],
    ['Chrome/', 'Chrome'],
    ['Safari/', 'Safari'],
  ].find(([mark]) => agent.includes(mark))
  const system = [
    ['Android', 'Android'],
    ['iPhone', 'iPhone'],
    ['iPad', 'iPad'],
    ['Windows', 'Windows'],
    ['Mac OS', 'Mac'],
    ['Linux', 'Linux'],
  ].find(([mark]) => agent.includes(mark))
  return [browser?.[1] ?? 'Browser', system?.[1]].filter(Boolean).join(' on ')
}
