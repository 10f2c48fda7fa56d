// Requests to the gateway. What goes wrong comes as a `Problem`.

const PATIENCE = 20_000

/** `status` 0: no answer came. `code` is the gateway's machine-readable name of the condition. */
export class Problem extends Error {
  constructor(status, code, detail) {
    super(detail)
    this.status = status
    this.code = code
  }

  /** Whether the same request may well succeed a little later. */
  get passing() {
    return [0, 408, 425, 502, 503, 504].includes(this.status) || (this.status === 429 && this.code !== 'queue_full')
  }
}

export class Api {
  /** @param {() => string} token the bearer token, or '' */
  constructor(token) {
    this.token = token
    // The gateway may be mounted below another path.
    this.base = new URL('.', location.href).pathname
  }

  /** The address of a session's part, with a token where headers cannot be sent. */
  eventsUrl(session, after) {
    const token = this.token()
    const query = new URLSearchParams({ after: String(after) })
    if (token) query.set('access_token', token)
    return `${this.session(session, '/events')}?${query}`
  }

  async call(method, path, body, { timeout = PATIENCE, signal } = {}) {
    const headers = { accept: 'application/json' }
    if (body !== undefined) headers['content-type'] = 'application/json'
    if (this.token()) headers.authorization = `Bearer ${this.token()}`
    const signals = [AbortSignal.timeout(timeout), ...(signal ? [signal] : [])]
    let response
    try {
      response = await fetch(path, {
        method,
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal: AbortSignal.any(signals),
        cache: 'no-store',
      })
      const value = response.status === 204 ? null : await response.json().catch(() => null)
      if (response.ok) return value
      throw new Problem(
        response.status,
        value?.code ?? 'error',
        value?.detail ?? `${response.status} ${response.statusText}`,
      )
    } catch (error) {
      if (error instanceof Problem || signal?.aborted) throw error
      throw new Problem(0, 'no_answer', 'the gateway cannot be reached')
    }
  }

  session(id, rest = '') {
    return `${this.base}v1/sessions/${encodeURIComponent(id)}${rest}`
  }

  events(session, after, { wait = 0, limit = 1000, timeout = PATIENCE, signal } = {}) {
    const path = this.session(session, `/events?after=${after}&limit=${limit}${wait ? `&wait=${wait}` : ''}`)
    return this.call('GET', path, undefined, { timeout: timeout + wait * 1000, signal })
  }

  send(session, body) {
    return this.call('POST', this.session(session, '/turns'), body)
  }

  cancel(session, turn, reason) {
    const path = this.session(session, turn ? `/turns/${encodeURIComponent(turn)}/cancel` : '/cancel')
    return this.call('POST', path, { reason })
  }

  answer(session, turn, request, value) {
    return this.call('POST', this.session(session, `/turns/${encodeURIComponent(turn)}/answer`), { request, value })
  }

  sessions() {
    return this.call('GET', `${this.base}v1/sessions?limit=50`)
  }

  /** What the page is to know of its gateway. */
  config() {
    return this.call('GET', `${this.base}page/config.json`)
  }

  /** Whether the gateway reaches its broker; if not, a `Problem`. */
  ready(options) {
    return this.call('GET', `${this.base}readyz`, undefined, options)
  }
}

/** A new id. (`crypto.randomUUID` exists only on https and localhost.) */
export function newId(prefix, length = 12) {
  const letters = 'abcdefghijkmnpqrstuvwxyz23456789'
  const bytes = crypto.getRandomValues(new Uint8Array(length))
  return `${prefix}-${Array.from(bytes, (byte) => letters[byte % letters.length]).join('')}`
}
